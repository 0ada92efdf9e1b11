"""Whole models: pieces equal the whole, rows themselves alone, blocks their formulas; every refusal."""

import pytest
import torch
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.core.bind import bound
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import detach, join, nbytes, rewind, select, tensors
from writehead.feedforward.dense import Chunked, Dense
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.parts import weights
from writehead.model.seq2seq import Seq2Seq

V = 13
MIXED = (
    {"name": "gqa", "heads": 4},
    {"name": "local_mqa", "heads": 4, "pattern": {"name": "window", "window": 5}},
)
CONFIGS = {
    "pre, rotary": {},
    "post, alibi": {
        "stack": {"name": "residual", "order": "post", "norm": "layer"},
        "position": {"name": "alibi"},
    },
    "parallel, sinusoidal": {
        "stack": {"name": "residual", "order": "parallel", "norm": "layer_no_bias", "one_norm": True},
        "position": {"name": "sinusoidal"},
        "mixer": {"name": "mqa", "heads": 4, "bias": "all", "qk_norm": 1e-6},
    },
    "learned, untied": {
        "position": {"name": "learned", "max_context": 60},
        "tie_embeddings": False,
        "head_bias": True,
        "embed_norm": True,
        "embed_scale": 4.0,
        "logit_scale": 0.5,
        "feedforward": (
            {"name": "dense", "gated": True, "activation": "silu"},
            {"name": "chunked", "chunk": 3},
        ),
    },
    "t5": {"position": {"name": "t5"}, "stack": {"name": "residual", "last_norm": False}},
    "infused": {"position": {"name": "infused"}},
}


def decoder(**changes) -> Decoder:
    model = (
        Decoder(ModelConfig(**{"vocab": V, "dim": 16, "depth": 3, "mixer": MIXED, **changes})).double().eval()
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def seq2seq(**changes) -> Seq2Seq:
    encoder = ModelConfig(
        vocab=V,
        dim=16,
        depth=1,
        kind="encoder",
        mixer={"name": "bidirectional", "heads": 4},
        position={"name": "t5"},
    )
    config = ModelConfig(
        vocab=V,
        dim=16,
        depth=2,
        kind="seq2seq",
        mixer={"name": "mqa", "heads": 4},
        position={"name": "t5"},
        cross={"name": "cross", "heads": 4, "kv_heads": 2},
        encoder=encoder,
        **changes,
    )
    return Seq2Seq(config).double().eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 1, 12], [1, 19]], ids=str)
def test_tokens_in_any_pieces_give_the_logits_of_one_call(name, sizes):
    model = decoder(**CONFIGS[name])
    tokens = torch.randint(V, (3, 20))
    right, aux = model(tokens)
    state, parts = model.init_state(3), []
    for piece in tokens.split(sizes, 1):
        logits, state = model.step(piece, state)
        parts.append(logits)
    close(torch.cat(parts, 1), right)
    assert right.shape == (3, 20, V)
    assert aux == {}
    assert state.pos.tolist() == [20] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_an_engines_bound_function_computes_the_same_bit_for_bit(name):
    model = decoder(**CONFIGS[name])
    tokens = torch.randint(V, (2, 9))
    run = model.bind(bound)
    a, b = model.init_state(2), model.init_state(2)
    for piece in tokens.split([6, 1, 1, 1], 1):
        x, a, _ = model.hidden(piece, a)
        y, b, _ = run(piece, b)
        assert torch.equal(x, y)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_rows_padded_anywhere_are_the_rows_alone(name):
    model = decoder(**CONFIGS[name])
    rows = [torch.randint(V, (n,)) for n in (4, 9, 6)]
    alone = [model(row[None])[0][0] for row in rows]
    batch = torch.full((3, 11), -1)
    places = [torch.tensor([0, 4, 5, 10]), torch.arange(9), torch.arange(5, 11)]
    for i, (row, at) in enumerate(zip(rows, places, strict=True)):
        batch[i, at] = row
    state, parts = model.init_state(3), []
    for piece in batch.split([3, 1, 7], 1):
        logits, state = model.step(piece, state)
        parts.append(logits)
    logits = torch.cat(parts, 1)
    for i, at in enumerate(places):
        close(logits[i, at], alone[i])
    assert state.pos.tolist() == [4, 9, 6]


@torch.no_grad()
def test_beams_are_moved_joined_and_taken_back_with_their_positions():
    model = decoder()
    prompts = [torch.randint(V, (1, n)) for n in (5, 8)]
    states = [model.step(p, model.init_state(1, Store(slack=4)))[1] for p in prompts]
    state = select(join(*states), torch.tensor([1, 0, 1]))
    assert state.pos.tolist() == [8, 5, 8]
    more = torch.randint(V, (3, 4))
    _, state = model.step(more, state)
    state = rewind(state, torch.tensor([4, 2, 0]))
    assert state.pos.tolist() == [8, 7, 12]
    last = torch.randint(V, (3, 1))
    logits, _ = model.step(last, state)
    kept = [prompts[1][0], torch.cat([prompts[0][0], more[1, :2]]), torch.cat([prompts[1][0], more[2]])]
    for i, text in enumerate(kept):
        close(logits[i, 0], model(torch.cat([text, last[i]])[None])[0][0, -1])


def test_layers_of_equal_layout_share_one_tensor_of_positions():
    state = decoder(mixer={"name": "mqa", "heads": 4}).init_state(2, Store(capacity=9))
    assert len({id(layer.pos) for layer, _ in state.layers}) == 1
    assert nbytes(state) == 3 * 2 * 9 * 2 * 4 * 8 + 2 * 9 * 8 + 2 * 8


def test_a_detached_state_continues_without_the_gradient_of_its_past():
    model = decoder()
    first, later = torch.randint(V, (2, 6)), torch.randint(V, (2, 3))
    _, state = model.step(first, model.init_state(2))
    assert any(t.requires_grad for t in tensors(state))
    whole = model.step(later, select(state, torch.arange(2)))[0]
    cut = detach(state)
    assert not any(t.requires_grad for t in tensors(cut))
    close(model.step(later, cut)[0], whole)


@torch.no_grad()
@pytest.mark.parametrize(
    ("order", "one_norm"), [("pre", False), ("post", False), ("parallel", False), ("parallel", True)]
)
def test_blocks_are_their_formulas(order, one_norm):
    model = decoder(
        depth=1, stack={"name": "residual", "order": order, "norm": "layer", "one_norm": one_norm}
    )
    (block,), x, pos = model.blocks, torch.randn(2, 6, 16).double(), Positions.range(2, 0, 6)
    y, _, _ = model.stack(x, pos, ((None, None),))
    f, norm, second = lambda h: block.mixer(h, pos)[0], block.mixer_norm, block.feedforward_norm
    if order == "pre":
        h = x + f(norm(x))
        right = h + block.feedforward(second(h))[0]
    elif order == "post":
        h = norm(x + f(x))
        right = second(h + block.feedforward(h)[0])
    else:
        right = x + f(norm(x)) + block.feedforward(norm(x) if one_norm else second(x))[0]
    close(y, model.stack.norm(right))


@torch.no_grad()
@pytest.mark.parametrize("order", ["pre", "post"])
def test_blocks_that_read_a_memory_are_their_formulas(order):
    model = seq2seq(stack={"name": "residual", "order": order, "norm": "layer"}).decoder
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)
    block, x, pos = next(iter(model.blocks)), torch.randn(2, 6, 16).double(), Positions.range(2, 0, 6)
    memory = block.cross.remember(torch.randn(2, 4, 16).double(), Positions.range(2, 0, 4))
    parts = (
        (lambda h: block.mixer(h, pos)[0], block.mixer_norm),
        (lambda h: block.cross(h, pos, memory)[0], block.cross_norm),
        (lambda h: block.feedforward(h)[0], block.feedforward_norm),
    )
    right = x
    for f, norm in parts:
        right = right + f(norm(right)) if order == "pre" else norm(right + f(right))
    close(block(x, pos, (None, memory))[0], right)


@torch.no_grad()
@pytest.mark.parametrize(
    ("order", "one_norm"), [("pre", False), ("post", False), ("parallel", False), ("parallel", True)]
)
def test_the_bidirectional_form_of_a_block_is_its_formula(order, one_norm):
    model = decoder(
        depth=1, stack={"name": "residual", "order": order, "norm": "layer", "one_norm": one_norm}
    )
    (block,), x, pos = model.blocks, torch.randn(2, 6, 16).double(), Positions.range(2, 0, 6)
    close(block.encode(x, pos)[0], block(x, pos, (None, None))[0])  # the mixer is causal either way


@torch.no_grad()
def test_embedding_and_logits_are_scaled_normalised_and_tied_as_said():
    tokens = torch.randint(V, (2, 5))
    model = decoder(embed_scale=3.0, logit_scale=0.5, head_bias=True, embed_norm=True)
    e, x = model.embedding, torch.randn(2, 5, 16).double()
    embedded = F.layer_norm(3.0 * e.table[tokens], (16,), e.norm.weight, e.norm.bias)
    close(e(tokens, Positions.range(2, 0, 5)), embedded)
    close(model.logits(x), 0.5 * x @ e.table.T + e.bias)
    untied = decoder(tie_embeddings=False)
    close(untied.logits(x), x @ untied.embedding.output.T)
    assert {name for name in weights(untied) if "output" in name} == {"embedding.output"}


@torch.no_grad()
def test_types_of_tokens_and_the_transform_before_the_output_stand_where_bert_has_them():
    tokens, types = torch.randint(V, (2, 5)), torch.tensor([[0, 2, 1, -1, 0], [1, 1, 0, 2, 2]])
    model = decoder(
        position={"name": "learned", "max_context": 9}, embed_norm=True, embed_norm_last=True, token_types=3,
        head_transform="gelu", stack={"name": "residual", "eps": 1e-2},
    )  # fmt: skip
    e, x, pos = model.embedding, torch.randn(2, 5, 16).double(), Positions.range(2, 0, 5)
    summed = e.table[tokens] + e.position.table[:5]
    for given, added in ((None, e.types[0]), (types, e.types[types.clamp_min(0)])):
        right = F.layer_norm(summed + added, (16,), e.norm.weight, e.norm.bias, 1e-2)
        close(e(tokens, pos, given), right)
    inner, norm = e.transform.inner, e.transform.norm
    h = F.layer_norm(F.gelu(x @ inner.weight.T + inner.bias), (16,), norm.weight, norm.bias, 1e-2)
    close(model.logits(x), h @ e.table.T)


@torch.no_grad()
def test_types_that_a_model_does_not_have_are_refused():
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    config = {
        "vocab": V, "dim": 16, "depth": 1, "kind": "encoder", "position": {"name": "sinusoidal"},
        "mixer": {"name": "bidirectional", "heads": 4},
    }  # fmt: skip
    with pytest.raises(ValueError, match="types were given, but the model has token_types=0"):
        Encoder(ModelConfig(**config))(tokens, tokens)
    model = Encoder(ModelConfig(**config, token_types=2))
    with pytest.raises(ValueError, match="type 2 is not one of the model's 2 token types"):
        model(tokens, tokens + 2)
    with pytest.raises(ValueError, match=r"types must have shape \(B=1, T=2\); got \(1, 1\)"):
        model(tokens, tokens[:, :1])
    close(model(tokens, tokens)[0], model(tokens)[0])


@torch.no_grad()
def test_dropout_acts_in_training_only():
    model = decoder(stack={"name": "residual", "dropout": 0.5})
    tokens = torch.randint(V, (2, 5))
    plain = model(tokens)[0]
    assert torch.equal(plain, model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    without = decoder().train()
    assert torch.equal(without(tokens)[0], without(tokens)[0])


@torch.no_grad()
def test_an_encoder_gives_each_row_what_it_gives_it_alone_and_reads_both_sides():
    config = ModelConfig(
        vocab=V,
        dim=16,
        depth=2,
        kind="encoder",
        mixer={"name": "bidirectional", "heads": 4},
        position={"name": "rotary"},
    )
    model = Encoder(config).double().eval()
    rows = [torch.randint(V, (n,)) for n in (3, 7)]
    batch = torch.full((2, 8), -1)
    batch[0, [1, 4, 5]], batch[1, :7] = rows[0], rows[1]
    x, pos, aux = model(batch)
    close(x[0, [1, 4, 5]], model(rows[0][None])[0][0])
    close(x[1, :7], model(rows[1][None])[0][0])
    assert pos.index[0].tolist() == [-1, 0, -1, -1, 1, 2, -1, -1]
    assert aux == {}
    changed = rows[1].clone()
    changed[-1] = (changed[-1] + 1) % V
    assert float((model(changed[None])[0][0, 0] - x[1, 0]).abs().max()) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_beams_of_one_source_share_its_memory_and_are_rows_alone(beams):
    model = seq2seq()
    source = torch.tensor([[3, 4, 5, 6], [7, 8, -1, -1]])
    state, _ = model.read(source)
    memories = [memory for _, memory in state.layers]
    before = [memory.k.data_ptr() for memory in memories]
    index = torch.arange(2).repeat_interleave(beams)
    state = select(state, index)
    target = torch.randint(V, (2 * beams, 5))
    logits, state = model.step(target, state)
    assert [memory.k.data_ptr() for _, memory in state.layers] == before
    assert all(len(memory.k) == 2 and len(memory.row) == 2 * beams for _, memory in state.layers)
    for i in range(2 * beams):
        row = source[index[i]]
        close(logits[i], model(row[row >= 0][None], target[i][None])[0][0])
    mixed = select(state, torch.tensor([beams, 0]))
    last = torch.randint(V, (2, 1))
    logits, _ = model.step(last, mixed)
    for i, old in enumerate((beams, 0)):
        row = source[index[old]]
        text = torch.cat([target[old], last[i]])
        close(logits[i, 0], model(row[row >= 0][None], text[None])[0][0, -1])


def test_a_seq2seq_learns_through_its_source_and_shares_one_table():
    model = seq2seq()
    assert model.encoder.embedding.table is model.decoder.embedding.table
    logits, aux = model(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 2]]))
    logits.square().sum().backward()
    assert aux == {}
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float(model.encoder.stack.blocks[0].mixer.qkv.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: decoder()(torch.tensor([[1, V]])), r"token 13 is not in the vocabulary of 13 \(0 to 12\)"),
        (
            lambda: decoder()(torch.tensor([1, 2])),
            r"tokens must have shape \(B=2, T\); got \(2,\)|tokens must have shape",
        ),
        (
            lambda: decoder().step(torch.tensor([[1, 2]]), decoder().init_state(3)),
            r"tokens must have shape \(B=3, T\); got \(1, 2\)",
        ),
        (
            lambda: decoder(position={"name": "learned", "max_context": 4})(
                torch.ones(1, 5, dtype=torch.int64)
            ),
            r"position 4 does not exist: this model has 4 positions \(0 to 3\); shorten the prompt",
        ),
        (lambda: seq2seq().encoder(torch.tensor([1, 2])), r"tokens must have shape \(B, T\); got \(2,\)"),
        (
            lambda: seq2seq().encoder(torch.tensor([[V + 3]])),
            r"token 16 is not in the vocabulary of 13 \(0 to 12\)",
        ),
        (
            lambda: ModelConfig.from_dict({**seq2seq().config.to_dict(), "vocab": V + 1}),
            "encoder and decoder share their embeddings, so encoder must have vocab=14; got vocab=13",
        ),
        (lambda: Dense(4, activation="glu"), "unknown activation 'glu'; did you mean 'gelu'"),
        (lambda: Dense(4, hidden=0), "hidden=0 must be at least 1"),
        (lambda: Chunked(4, chunk=0), "chunk=0 must be at least 1"),
    ],
)
def test_what_a_model_refuses_it_says(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_full_position_table_stops_the_next_step_and_not_an_earlier_one():
    model = decoder(position={"name": "learned", "max_context": 4})
    _, state = model.step(torch.ones(1, 3, dtype=torch.int64), model.init_state(1))
    _, state = model.step(torch.tensor([[1]]), state)
    with pytest.raises(ValueError, match="position 4 does not exist: this model has 4 positions"):
        model.step(torch.tensor([[1]]), state)
    _, state = model.step(
        torch.tensor([[-1]]), model.step(torch.ones(1, 4, dtype=torch.int64), model.init_state(1))[1]
    )
    assert state.pos.tolist() == [4]


def test_the_same_seed_makes_the_same_weights():
    def made():
        torch.manual_seed(3)
        return weights(Decoder(ModelConfig(vocab=V, dim=16, depth=1, mixer={"name": "mqa", "heads": 4})))

    a, b = made(), made()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
