"""The Axial Transformer's decoders: the paper's equations, the laws, the exact state, drawing fast and slow."""

import pytest
import torch
from reference import axial as paper

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import CannotRewind, nbytes, rewind
from writehead.core.work import Call
from writehead.costs import state_bytes
from writehead.decode.engine import TorchEngine
from writehead.decode.images import draw_images
from writehead.laws import Layers, check
from writehead.model.blank import blank
from writehead.model.decoder import Decoder

H, W, X = 4, 3, 8
CONFIG = {
    "vocab": 5,
    "dim": X,
    "depth": 6,
    "mixer": {"name": "axial", "heads": 2},
    "feedforward": {"name": "dense", "hidden": 12, "activation": "silu", "bias": True},
    "stack": {"name": "axial_decoders", "image_width": W, "outer": 4},
    "position": {"name": "grid", "shape": [H, W]},
    "pixels": {"name": "categorical", "height": H, "width": W, "levels": 4},
}


def model(**values):
    torch.manual_seed(0)
    made = Decoder(ModelConfig.from_dict({**CONFIG, **values})).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def layer_of(block):
    """A layer's parts as functions of one vector."""
    qkv, D = block.mixer.qkv, block.mixer.qkv.head_dim
    weights = qkv.weight.split([qkv.heads * D, qkv.kv_heads * D, qkv.kv_heads * D])
    biases = qkv.bias.split([qkv.heads * D, qkv.kv_heads * D, qkv.kv_heads * D])
    group = qkv.heads // qkv.kv_heads

    def head(which):
        def project(x):
            y = weights[which] @ x + biases[which]
            return y if which == 0 else y.view(-1, D).repeat_interleave(group, 0).flatten()

        return project

    out, feed = block.mixer.out, block.feedforward
    return (
        block.mixer_norm, head(0), head(1), head(2), lambda x: out.weight @ x + out.bias,
        block.feedforward_norm,
        lambda x: feed.outer(torch.nn.functional.silu(feed.inner(x))),
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_stack_is_the_papers_decoders_with_gradients(kv_heads):
    made = model(mixer={"name": "axial", "heads": 2, "kv_heads": kv_heads}).stack
    x = torch.randn(2, H * W, X, dtype=torch.float64, requires_grad=True)
    y, _ = made.whole(x, Positions.range(2, 0, H * W), None)
    layers = [layer_of(block) for block in made.blocks]
    rows = []
    for one in x:
        shifted = [[one[r * W + c] for c in range(W)] for r in range(H)]
        h = [[one[r * W + c + 1] for c in range(W)] for r in range(H - 1)]
        z = paper.decoders(h, shifted, layers[:4], layers[4:], 2)
        rows.append(torch.stack([made.norm(v) for row in z for v in row]))
    right = torch.stack(rows)
    torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), [x, *made.parameters()], allow_unused=True)
    theirs = torch.autograd.grad((right * weight).sum(), [x, *made.parameters()], allow_unused=True)
    assert len([g for g in ours if g is not None]) > 40
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", ["split", "causal", "select", "padding"])
def test_the_decoders_obey_the_laws(law):
    made = model(position={"name": "grid", "shape": [40, W]}, depth=5)
    verdict = check(Layers(made), law, dim=X, length=17)
    assert verdict.passed, verdict


@pytest.mark.parametrize("context", [0, 1, W, W + 1, 2 * W, 2 * W + 1, H * W])
@pytest.mark.parametrize("capacity", [0, 12])
def test_the_state_has_the_bytes_that_are_predicted(context, capacity):
    made, store = model(depth=6), Store(capacity=capacity)
    state = made.init_state(2, store)
    with torch.no_grad():
        for _ in range(context):
            _, state = made.step(torch.ones(2, 1, dtype=torch.int64), state)
    if context:
        call = Call(batch=2, tokens=1, context=context - 1, itemsize=8, store=store)
        assert nbytes(state) == state_bytes(made, call)
    assert TorchEngine(made).state_bytes(2, context, store) == nbytes(state)


def test_between_the_ends_of_rows_a_step_is_the_inner_decoders_only():
    made, ran = model(), []
    for number, block in enumerate(made.stack.blocks):
        block.mixer.qkv.register_forward_hook(lambda *_, number=number: ran.append(number))
    state = made.init_state(1)
    counts = []
    with torch.no_grad():
        for _ in range(2 * W + 1):
            ran.clear()
            _, state = made.step(torch.ones(1, 1, dtype=torch.int64), state)
            counts.append(len(ran))
    assert counts == [2] * W + [6] + [2] * (W - 1) + [6]


def test_drawing_from_the_state_is_drawing_by_whole_calls():
    made = model()
    fast, _ = draw_images(made, 2, seed=3)
    tokens = made.embedding.frame.tokens(fast)
    first = torch.full((2, 1), 4)
    with torch.no_grad():
        whole, _ = made(torch.cat([first, tokens[:, :-1]], 1))
        for t in range(H * W):
            logits, _ = made(torch.cat([first, tokens[:, :t]], 1))
            torch.testing.assert_close(logits[:, -1], whole[:, t], rtol=1e-10, atol=1e-10)


def test_a_state_of_finished_rows_cannot_rewind():
    made = model()
    _, state = made.step(torch.ones(1, 5, dtype=torch.int64), made.init_state(1))
    with pytest.raises(CannotRewind):
        rewind(state, 1)


REFUSED = [
    ({"mixer": {"name": "mha"}}, "the axial stack is made of one mixer, named 'axial'"),
    ({"mixer": ({"name": "axial"},)}, "the axial stack is made of one mixer"),
    ({"mixer": {"name": "axial", "axis": 1}}, "mixer.axis is the axial stack's to choose"),
    ({"stack": {"name": "axial_decoders", "outer": 3}}, "outer=3 must be an even number of at least 2"),
    ({"stack": {"name": "axial_decoders", "outer": 6}}, "outer=6 must be .* below the depth of 6"),
    ({"stack": {"name": "axial_decoders", "dropout": 1.0}}, "dropout=1.0 must be from 0 up to 1"),
    ({"stack": {"name": "axial_decoders", "image_width": 0}}, r"width=0\): width must be at least 1"),
    (
        {"kind": "encoder", "pixels": None, "position": {"name": "sinusoidal"}},
        "the axial_decoders stack decodes; it serves decoders only",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_stacks_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        blank(ModelConfig(**{**CONFIG, **values}))


def test_initialisations_are_those_of_the_papers():
    sizes = {"dim": 256, "depth": 4, "feedforward": {"name": "dense", "bias": True}}
    sparse = {"mixer": {"name": "sparse_strided", "stride": 3}, "stack": {"name": "residual"}, **sizes}
    torch.manual_seed(0)
    made = Decoder(ModelConfig.from_dict({**CONFIG, **sparse, "init": "sparse"}))
    block = made.stack.blocks[1]
    unit = 0.125 / 256**0.5
    with torch.no_grad():
        assert float(block.mixer.qkv.weight.std()) == pytest.approx(unit, rel=0.03)
        assert float(block.mixer.out.weight.std()) == pytest.approx(unit / 8**0.5, rel=0.03)
        assert float(block.feedforward.inner.weight.std()) == pytest.approx(unit, rel=0.03)
        assert float(block.feedforward.outer.weight.std()) == pytest.approx(unit / 2 / 8**0.5, rel=0.03)
        assert float(made.embedding.table.std()) == pytest.approx(unit, rel=0.1)
        assert float(made.embedding.position.tables[0].std()) == pytest.approx(unit / 2**0.5, rel=0.1)
        assert float(made.embedding.output.abs().max()) == 0
        assert float(block.feedforward.inner.bias.abs().max()) == 0
        logits, _ = made(torch.tensor([[4, 1]]))
        assert logits[..., :4].unique().tolist() == [0]
        made = Decoder(ModelConfig.from_dict({**CONFIG, **sizes, "depth": 6, "init": "axial"}))
        for weight in (made.stack.blocks[0].mixer.out.weight, made.embedding.output):
            assert float(weight.std()) == pytest.approx(1e-5 / 16, rel=0.1)
        assert float(made.embedding.table.std()) == pytest.approx(5 / 16, rel=0.1)


def test_initialisations_that_cannot_be_are_refused():
    base = {"vocab": 5, "dim": 8, "depth": 1, "mixer": {"name": "mqa", "heads": 2}}
    with pytest.raises(ValueError, match="unknown init 'sparce'; did you mean 'sparse'"):
        ModelConfig(**base, init="sparce")
    with pytest.raises(ValueError, match="set tie_embeddings=False"):
        Decoder(ModelConfig(**base, init="sparse"))
    with pytest.raises(ValueError, match="init='axial' is for models of kind 'decoder'"):
        ModelConfig(**base, kind="encoder", init="axial")
