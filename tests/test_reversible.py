"""The reversible stack against ordinary backpropagation through the same equations, written out here."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from writehead.catalog import MIXERS
from writehead.config import ModelConfig
from writehead.core.bind import itself
from writehead.core.positions import Positions
from writehead.core.replay import Tape, choose, contexts, first_time
from writehead.decode.generate import generate
from writehead.feedforward.dense import Chunked, Dense
from writehead.laws import Layers, build_tiny, check
from writehead.mixer import NOTHING
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.seq2seq import Seq2Seq
from writehead.stacks.reversible import Reversible

DIM, T = 16, 19
CAUSAL = [name for name, row in MIXERS.items() if row.decodes != "encode" and name != "cross"]
ENCODERS = {name: build_tiny(row, {"name": "none"}) for name, row in MIXERS.items()}
ENCODING = [name for name, m in ENCODERS.items() if hasattr(m, "encode")]


def tiny(name, seed):
    softmax = MIXERS[name].target == "mixers.softmax:Softmax"
    return build_tiny(MIXERS[name], {"name": "t5" if softmax else "rotary"}, seed)


def make(mixers, **options) -> Reversible:
    layers = [
        (mixer, Chunked(DIM, chunk=7, hidden=24) if i % 2 else Dense(DIM, hidden=24, bias=True), None)
        for i, mixer in enumerate(mixers)
    ]
    return Reversible(DIM, layers, **options)


def ordinary(stack, x, pos, encode=False):
    """Kitaev et al. 2020, equation 9, layer by layer; gives the output and the sum of all auxiliary values."""
    a = b = x
    extra = x.new_zeros(())
    for block in stack.blocks:
        h = block.mixer_norm(b)
        y, aux = block.mixer.encode(h, pos) if encode else block.mixer(h, pos)[::2]
        a = a + F.dropout(y, block.dropout, stack.training)
        z, more = block.feedforward(block.feedforward_norm(a))
        b = b + F.dropout(z, block.dropout, stack.training)
        extra = extra + sum(aux.values()) + sum(more.values())
    return stack.norm(torch.cat([a, b], -1) if stack.output == "concat" else (a + b) / 2), extra


def compare(stack, dtype=torch.float64, encode=False, seed=5):
    """The largest deviation of values and gradients, each relative to the largest of its kind."""
    stack.to(dtype)
    x = torch.randn(2, T, DIM, dtype=dtype, requires_grad=True)
    index = torch.arange(T).repeat(2, 1)
    index[1, :4], index[1, 4:] = -1, torch.arange(T - 4)
    wanted = [x, *(p for p in stack.parameters() if p.requires_grad)]
    weight = torch.randn(2, T, stack.norm.weight.shape[0], dtype=dtype)
    results, before = [], {name: t.clone() for name, t in stack.state_dict().items()}
    for run in (ordinary, reversed_):
        stack.load_state_dict(before)  # centroids move in training
        torch.manual_seed(seed)
        y, extra = run(stack, x, Positions(index), encode)
        value = (y * weight)[index >= 0].sum() + extra
        by = torch.autograd.grad(value, wanted, materialize_grads=True)
        results.append([y[index >= 0].detach(), *by])
    return max(float((p - q).abs().max() / p.abs().max().clamp_min(1)) for p, q in zip(*results, strict=True))


def reversed_(stack, x, pos, encode):
    empty = ((None, None),) * len(stack.blocks)
    y, aux = stack.encode(x, pos) if encode else stack.whole(x, pos, empty)
    return y, x.new_zeros(()) + sum(aux.values())


@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_equal_ordinary_backpropagation_for_every_causal_mixer(name):
    assert compare(make([tiny(name, seed) for seed in range(3)])) < 1e-9


@pytest.mark.parametrize("name", ENCODING)
def test_gradients_equal_ordinary_backpropagation_for_every_encoder(name):
    assert compare(make([tiny(name, seed) for seed in range(3)]), encode=True) < 1e-9


def test_what_layers_hand_on_beside_x_has_its_gradient_in_every_layer():
    stack = make([tiny("luna_encoder", seed) for seed in range(3)]).double()
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    slots = torch.randn(
        2, len(stack.blocks[0].mixer.parts.slots), DIM, dtype=torch.float64, requires_grad=True
    )
    found, weight = [], torch.randn_like(x)
    for run in (ordinary, reversed_):
        pos = Positions.range(2, 0, T)
        pos.streams["luna"] = slots
        y, _ = run(stack, x, pos, True)
        found.append(torch.autograd.grad((y * weight).sum(), [slots, stack.blocks[0].mixer.parts.key.weight]))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 1e-4
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("output", ["mean", "concat"])
def test_dropout_is_drawn_again_as_it_was(output):
    stack = make([tiny("gqa", seed) for seed in range(4)], dropout=0.3, output=output)
    assert compare(stack) < 1e-9
    assert compare(stack, torch.float32) < 1e-4
    assert compare(stack.eval()) < 1e-9


def test_backward_leaves_the_random_generator_where_forward_left_it():
    stack = make([tiny("mqa", 0)], dropout=0.5)
    y, _ = stack.whole(torch.randn(1, 6, DIM), Positions.range(1, 0, 6), ((None, None),))
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


class Chooser(nn.Module):
    """Reads one earlier token, the one with the largest last coordinate, and counts its calls."""

    def __init__(self, flip: float = 0.0) -> None:
        super().__init__()
        self.matrix, self.flip, self.calls, self.effects, self.seen = nn.Linear(DIM, DIM), flip, 0, 0, []

    def forward(self, x, pos, state=None):
        self.calls += 1
        if first_time():
            self.effects += 1
        sign = (
            -1.0 if self.calls > 1 and self.flip else 1.0
        )  # a second computation that would choose otherwise
        best = choose(lambda: (sign * x[..., -1]).cummax(1).indices)
        self.seen.append(best)
        y = self.matrix(x.gather(1, best[..., None].expand_as(x)))
        return y, state, {"chooser_loss": (y**2).mean()}


def test_a_choice_is_repeated_although_it_would_now_fall_otherwise_and_effects_happen_once():
    mixer = Chooser(flip=1.0)
    stack = make([mixer])
    y, _ = stack.whole(torch.randn(2, T, DIM), Positions.range(2, 0, T), ((None, None),))
    y.sum().backward()
    assert (mixer.calls, mixer.effects) == (2, 1)
    assert torch.equal(*mixer.seen)


class Planner(nn.Module):
    """Asks for three things that layers share: of whole numbers, of floats, and of its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.gain, self.made = nn.Linear(DIM, DIM), nn.Parameter(torch.ones(DIM)), []

    def plan(self, index):
        self.made.append("plan")
        return [index.flip(1), (index.max(),)]

    def wave(self, order):
        self.made.append("wave")
        return torch.cos(order.double())

    def scaled(self, wave):
        self.made.append("scaled")
        return wave[..., None] * self.gain

    def forward(self, x, pos, state=None):
        order, _ = pos.once(self.plan, pos.index)
        y = self.matrix(x) * pos.once(self.scaled, pos.once(self.wave, order))
        return y.to(x.dtype), state, NOTHING


def test_what_layers_share_is_made_once_a_pass_unless_it_has_a_gradient():
    stack = make([planner := Planner()] * 3)
    y, _ = stack.whole(torch.randn(2, T, DIM), Positions.range(2, 0, T), ((None, None),) * 3)
    assert planner.made == ["plan", "wave", "scaled"]
    planner.made.clear()
    y.sum().backward()
    assert planner.made == ["wave", "scaled", "scaled", "scaled"]
    assert compare(stack) < 1e-9


def test_auxiliary_losses_have_their_gradients():
    torch.manual_seed(1)
    assert compare(make([Chooser(), Chooser()])) < 1e-9


def test_a_checkpointed_mixer_repeats_its_choices_too():
    mixer, x = Chooser(flip=1.0), torch.randn(2, T, DIM, requires_grad=True)
    pos = Positions.range(2, 0, T)
    y = checkpoint(lambda x: mixer(x, pos)[0], x, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    assert mixer.effects == 1
    assert torch.equal(*mixer.seen)


def test_a_tape_inside_a_second_computation_repeats_what_the_outer_one_noted():
    outer, inner, drawn = Tape(), Tape(), []
    for around in (outer.record(), outer.replay()):
        with around, inner.record():
            drawn.append((int(choose(torch.randint, 1000, (1,))), first_time()))
    with inner.replay():
        drawn.append((int(choose(torch.randint, 1000, (1,))), first_time()))
    assert drawn == [(drawn[0][0], True), (drawn[0][0], False), (drawn[0][0], False)]


def saved_bytes(depth, run=None):
    """What autograd holds between forward and backward, parameters aside."""
    stack = make([tiny("mqa", seed) for seed in range(depth)])
    held, parameters = {}, {p.data_ptr() for p in stack.parameters()}

    def note(t):
        if t.data_ptr() not in parameters:
            held[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(2, 64, DIM, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive = (run or reversed_)(stack, x, Positions.range(2, 0, 64), False)
        assert alive
    return sum(held.values())


def test_what_autograd_holds_does_not_grow_with_depth():
    stream = 2 * 64 * DIM * 4
    assert saved_bytes(3) == saved_bytes(12) == saved_bytes(24) < 6 * stream
    assert saved_bytes(3, ordinary) > 20 * stream


def test_float32_streams_are_found_again_to_one_in_ten_thousand_over_24_layers():
    stack = make([tiny("mqa", seed) for seed in range(24)], measure_drift=True)
    assert stack.drift.worst is None
    y, _ = stack.whole(torch.randn(2, T, DIM), Positions.range(2, 0, T), ((None, None),) * 24)
    y.sum().backward()
    assert 0 < stack.drift.worst < 1e-4


def test_in_bfloat16_gradients_are_as_good_as_those_of_ordinary_backpropagation():
    stack = make([tiny("mqa", seed) for seed in range(6)], measure_drift=True).bfloat16()
    x, weight = torch.randn(2, T, DIM).bfloat16(), torch.randn(2, T, DIM)

    def gradient(run, dtype):
        stack.to(dtype).zero_grad()
        y, _ = run(stack, x.to(dtype), Positions.range(2, 0, T), False)
        assert y.dtype == dtype
        (y.double() * weight).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in stack.parameters()])

    right = gradient(ordinary, torch.float64)
    theirs, ours = ((gradient(run, torch.bfloat16) - right).norm() for run in (ordinary, reversed_))
    assert 0 < ours < 1.1 * theirs
    assert stack.drift.worst < 1e-2


def test_autocast_holds_in_the_second_computation():
    stack = make([tiny("mqa", seed) for seed in range(2)])
    x, found = torch.randn(2, T, DIM), []
    for run in (ordinary, reversed_):
        stack.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = run(stack, x, Positions.range(2, 0, T), False)
        y.float().sum().backward()
        found.append(stack.blocks[0].mixer.qkv.weight.grad)
    assert torch.equal(found[0].bfloat16(), found[1].bfloat16()) or (
        (found[0] - found[1]).abs().max() < 2e-2 * found[0].abs().max()
    )
    assert found[0].abs().max() > 0


def test_gradients_of_several_backward_passes_add_up():
    stack = make([tiny("gqa", 0)]).double()
    x, pos = torch.randn(2, T, DIM, dtype=torch.float64), Positions.range(2, 0, T)
    totals = []
    for rows in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        stack.zero_grad()
        for part in rows:
            y, _ = stack.whole(x[part], Positions(pos.index[part]), ((None, None),))
            (y**2).sum().backward()
        totals.append(stack.blocks[0].mixer.qkv.weight.grad)
    assert torch.allclose(*totals, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_needs_the_graph_retained_and_then_gives_the_same():
    stack = make([tiny("mqa", 0)])
    x = torch.randn(1, 5, DIM, requires_grad=True)

    def total():
        return stack.whole(x, Positions.range(1, 0, 5), ((None, None),))[0].square().sum()

    y = total()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    a, _, _, _ = stack._chain(itself, "whole")(x, Positions.range(1, 0, 5), ((None, None),), False)
    torch.autograd.grad(a.sum(), x)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(a.sum(), x)


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    stack = make([tiny("mqa", 0)])
    stack.blocks[0].mixer.requires_grad_(False)
    y, _ = stack.whole(torch.randn(1, 5, DIM), Positions.range(1, 0, 5), ((None, None),))
    y.sum().backward()
    assert stack.blocks[0].mixer.qkv.weight.grad is None
    assert stack.blocks[0].feedforward.inner.weight.grad.abs().max() > 0


def config(**values) -> ModelConfig:
    mixers = ({"name": "mqa", "heads": 4}, {"name": "local_mqa", "heads": 4})
    base = {
        "vocab": 11,
        "dim": DIM,
        "depth": 3,
        "mixer": mixers,
        "feedforward": {"name": "dense", "hidden": 8},
    }
    return ModelConfig(**{**base, "stack": {"name": "reversible", "dropout": 0.1}, **values})


@pytest.mark.parametrize("law", ["split", "causal", "select", "padding", "rewind"])
def test_whole_decoders_obey(law):
    verdict = check(Layers(Decoder(config(position={"name": "t5"}))), law, length=13)
    assert verdict.passed, verdict


def test_a_decoder_generates_what_rescoring_finds_most_likely():
    model = Decoder(config(stack={"name": "reversible", "output": "concat"}, tie_embeddings=False)).eval()
    out = generate(model, [[1, 2, 3]], max_new_tokens=8)
    said = torch.tensor([[1, 2, 3, *out[0].tokens]])
    assert said.shape[1] == 11
    logits, _ = model(said)
    assert logits[0, 2:-1].argmax(-1).tolist() == said[0, 3:].tolist()


def test_an_encoder_and_a_decoder_that_reads_it_train_as_with_ordinary_backpropagation():
    encoder = config(
        kind="encoder", depth=2, mixer={"name": "bidirectional", "heads": 4}, position={"name": "t5"}
    )
    model = Seq2Seq(
        config(kind="seq2seq", cross={"name": "cross", "heads": 4}, encoder=encoder, position={"name": "t5"})
    ).double().eval()  # fmt: skip
    source, target = torch.randint(11, (2, 7)), torch.randint(11, (2, 5))
    source[1, 4:] = -1
    (model(source, target)[0] ** 2).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    x, pos = (
        model.encoder.embedding(source, at := Positions(torch.where(source < 0, -1, torch.arange(7)))),
        at,
    )
    x, _ = ordinary(model.encoder.stack, x, pos, encode=True)
    here = Positions.range(2, 0, 5)
    a = b = model.decoder.embedding(target, here)
    for block in model.decoder.blocks:
        a, b = b, a + block.mixer(block.mixer_norm(b), here)[0]
        a, b = b, a + block.cross(block.cross_norm(b), here, block.cross.remember(x, pos))[0]
        a, b = b, a + block.feedforward(block.feedforward_norm(b))[0]
    (model.decoder.logits(model.decoder.stack.norm((a + b) / 2)) ** 2).sum().backward()
    assert isinstance(model.encoder, Encoder)
    for name, p in model.named_parameters():
        assert float((p.grad - found[name]).abs().max()) < 1e-9 * max(1.0, float(p.grad.abs().max())), name


def test_chunks_of_a_sequence_with_their_state_train_as_the_whole():
    model = Decoder(config(position={"name": "t5"})).double().eval()
    tokens = torch.randint(11, (2, 12))
    (model(tokens)[0] ** 2).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x, state, _ = model.hidden(tokens[:, :5], model.init_state(2))
    y, _, _ = model.hidden(tokens[:, 5:], state)
    (model.logits(torch.cat([x, y], 1)) ** 2).sum().backward()
    for p, right in zip(model.parameters(), whole, strict=True):
        assert float((p.grad - right).abs().max()) < 1e-9 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Reversible(DIM, [], output="sum"), "unknown output 'sum'.*accepted: concat, mean"),
        (lambda: Reversible(DIM, [], dropout=1.0), "dropout=1.0 must be from 0 up to 1"),
        (lambda: Reversible(DIM, [], eps=-1.0), "eps=-1.0 must be from 0 up to 1"),
        (
            lambda: Decoder(config(stack={"name": "reversible", "output": "concat"})),
            "the last vectors 32 wide, the embeddings have width 16: set tie_embeddings=False",
        ),
        (
            lambda: Encoder(
                config(
                    kind="encoder",
                    mixer={"name": "bidirectional"},
                    stack={"name": "reversible", "output": "concat"},
                )
            ),
            'an encoder gives vectors of width dim: its stack needs output="mean"',
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_second_derivatives_are_refused():
    stack = make([tiny("mqa", 0)])
    x = torch.randn(1, 4, DIM, requires_grad=True)
    y, _ = stack.whole(x, Positions.range(1, 0, 4), ((None, None),))
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_nothing_stands_for_no_auxiliary_values():
    stack = make([tiny("mqa", 0)])
    _, aux = stack.whole(torch.randn(1, 4, DIM), Positions.range(1, 0, 4), ((None, None),))
    assert aux == NOTHING
