"""Costs: closed figures against counted operations, real parameters and real states."""

import inspect
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from writehead.catalog import FEEDFORWARDS, MIXERS, load
from writehead.config import ModelConfig
from writehead.core.pattern import Causal, Full, Leading, PerHead, Window
from writehead.core.slots import Store
from writehead.core.state import nbytes
from writehead.core.work import Call, Work, scores
from writehead.costs import Costs, costs, match_ffn_width, parameters, read_costs, skeleton, state_bytes
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.seq2seq import Seq2Seq

CAUSAL = [name for name, row in MIXERS.items() if row.decodes not in ("encode", "O(1)")]


def fused(q: Any, k: Any, v: Any, dropout: Any = 0, causal: bool = False, *_: Any, **__: Any) -> int:
    """Operations of PyTorch's fused CPU attention, unknown to its counter; shapes (B, heads, rows, D)."""
    T, S = q[-2], k[-2]
    pairs = T * (T + 1) // 2 if causal else T * S
    return 2 * prod(q[:-2]) * pairs * (q[-1] + v[-1])


def counted(call: Any) -> int:
    """Operations that PyTorch does in `call()`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping={kernel: fused}) as counter:
        call()
    return counter.get_total_flops()


def config(mixer: Any = "mqa", **changes: Any) -> ModelConfig:
    spec = {"name": mixer, "heads": 4} if isinstance(mixer, str) else mixer
    if "position" not in inspect.signature(load(MIXERS[spec["name"]])).parameters:
        changes = {"position": {"name": "none"}, **changes}
    return ModelConfig(**{"vocab": 50, "dim": 32, "depth": 2, "mixer": spec, **changes})


TURNED = {
    "name": "rotary"
}  # a decode step may turn heads by a product, which is no work that a model must do
PLACED = [{"name": n} for n in ("alibi", "t5", "infused", "sinusoidal", "none")]


@st.composite
def configs(draw: Any, positions: Any = (*PLACED, TURNED)) -> ModelConfig:
    heads = draw(st.sampled_from([2, 4, 6]))
    mixers = tuple(
        {
            "name": draw(st.sampled_from(["mha", "mqa", "local_mha", "local_mqa", "sink_mqa"])),
            "heads": heads,
            "head_dim": 6,
            "bias": draw(st.sampled_from(["none", "qkv", "all"])),
            "qk_norm": draw(st.sampled_from([None, 1e-6])),
        }
        for _ in range(draw(st.integers(1, 3)))
    )
    feedforward = {
        "name": draw(st.sampled_from(sorted(FEEDFORWARDS))),
        "hidden": draw(st.integers(1, 40)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    position = draw(st.sampled_from([*positions, {"name": "learned", "max_context": 90}]))
    return ModelConfig(
        vocab=draw(st.integers(5, 60)),
        dim=24,
        depth=draw(st.integers(1, 4)),
        mixer=mixers,
        feedforward=feedforward,
        position=position,
        tie_embeddings=draw(st.booleans()),
        embed_norm=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        token_types=draw(st.sampled_from([0, 3])),
        head_transform=draw(st.sampled_from([None, "gelu"])),
    )


@pytest.mark.slow
@settings(max_examples=20, derandomize=True, deadline=None)
@given(configs(), st.integers(1, 3), st.integers(0, 40), st.sampled_from([0, 7, 64]), st.booleans())
def test_parameters_and_state_bytes_are_those_of_the_real_tensors(
    cfg: ModelConfig, batch: int, context: int, capacity: int, int8: bool
) -> None:
    real = Decoder(cfg)
    assert parameters(skeleton(cfg)) == sum(p.numel() for p in real.parameters())
    store = Store(capacity=capacity, dtype=torch.int8 if int8 else None)
    call = Call(batch=batch, context=context, store=store)
    with torch.inference_mode():
        state = real.init_state(batch, store)
        for piece in torch.randint(cfg.vocab, (batch, context + 1)).split(9, 1):
            _, state = real.step(piece, state)
    assert state_bytes(skeleton(cfg), call) == nbytes(state)


@pytest.mark.slow
@settings(max_examples=20, derandomize=True, deadline=None)
@given(configs(positions=PLACED), st.integers(1, 3), st.integers(0, 40))
def test_operations_of_a_decode_step_are_those_that_pytorch_counts(
    cfg: ModelConfig, batch: int, context: int
) -> None:
    model = Decoder(cfg)
    with torch.inference_mode():
        state = model.init_state(batch)
        if context:
            _, state = model.step(torch.randint(cfg.vocab, (batch, context)), state)
    token = torch.zeros(batch, 1, dtype=torch.int64)
    assert costs(skeleton(cfg), Call(batch=batch, context=context)).flops == counted(
        lambda: model.step(token, state)
    )


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
def test_operations_of_a_forward_are_those_that_pytorch_counts(name: str) -> None:
    cfg = config(name)
    model = Decoder(cfg)
    tokens = torch.randint(cfg.vocab, (2, 40))
    assert costs(model, Call(batch=2, tokens=40)).flops == counted(lambda: model(tokens))


def test_operations_of_an_encoder_are_those_that_pytorch_counts() -> None:
    cfg = config("bidirectional", kind="encoder", position={"name": "learned", "max_context": 20})
    model = Encoder(cfg)
    tokens = torch.randint(cfg.vocab, (3, 11))
    cost = costs(model, Call(batch=3, tokens=11))
    assert cost.flops == counted(lambda: model(tokens))
    assert (cost.state_read, cost.state_written, cost.state_bytes) == (0, 0, 0)
    unread = (50 - 33) * 32  # rows of the table beyond one for each of the 33 tokens
    assert cost.weight_bytes == 4 * (parameters(model) - unread)


def seq2seq(**changes: Any) -> ModelConfig:
    encoder = config("bidirectional", kind="encoder", position={"name": "sinusoidal"})
    cross = {"name": "cross", "heads": 4, "kv_heads": 2, "bias": "all"}
    position = {"name": "sinusoidal"}
    return config("mha", kind="seq2seq", encoder=encoder, cross=cross, position=position, **changes)


def test_costs_of_a_model_that_reads_a_source_are_those_of_its_two_halves() -> None:
    cfg = seq2seq()
    model, source = Seq2Seq(cfg), torch.randint(50, (2, 13))
    call = Call(batch=2, context=4, source=13)
    with torch.inference_mode():
        state, _ = model.read(source)
        _, state = model.step(torch.randint(50, (2, 4)), state)
    token = torch.zeros(2, 1, dtype=torch.int64)
    cost = costs(skeleton(cfg), call)
    assert cost.flops == counted(lambda: model.step(token, state))
    with torch.inference_mode():
        assert cost.state_bytes == nbytes(model.step(token, state)[1])
    reading = read_costs(skeleton(cfg), call)
    assert reading.flops == counted(lambda: model.read(source))
    assert reading.state_written == sum(nbytes(memory) for _, memory in state.layers)
    fresh = parameters(skeleton(cfg)) - 2 * 2 * 2 * 8 * (32 + 1)  # all but the memory's projection
    assert cost.weight_bytes == 4 * (fresh - sum(p.numel() for p in model.encoder.stack.parameters()))


def test_a_tied_decoder_reads_every_weight_once_a_step_and_its_cache_once() -> None:
    cfg = config("mqa")
    cost = costs(skeleton(cfg), Call(batch=3, context=10, itemsize=2))
    assert cost.weight_bytes == 2 * parameters(skeleton(cfg))
    assert cost.state_read == 2 * 3 * 10 * 2 * 2 * 8  # depth, rows, slots, key and value, bytes, width
    assert cost.state_written == 2 * 3 * 1 * 2 * 2 * 8
    assert cost.moved == cost.weight_bytes + cost.state_read + cost.state_written


def test_an_int8_cache_moves_a_byte_a_value_and_two_scales_a_slot() -> None:
    cost = costs(skeleton(config("mqa")), Call(context=10, store=Store(dtype=torch.int8)))
    assert cost.state_read == 2 * 10 * (2 * 8 + 2 * 4)


def test_a_window_bounds_operations_and_bytes_of_a_step() -> None:
    spec = {"name": "mqa", "heads": 4, "pattern": {"name": "window", "window": 6}}
    at = [costs(skeleton(config(spec)), Call(context=context)) for context in (4, 6, 6000)]
    assert at[0].state_read < at[1].state_read
    assert replace(at[1], state_bytes=0) == replace(at[2], state_bytes=0)


@pytest.mark.parametrize(
    "pattern",
    [
        Causal(),
        Window(5),
        Causal() & (Window(4) | Leading(2)),
        Window(3, after=2),
        Full() & Window(4),
        Leading(2) | Window(2, 1),
        Full(),
    ],
)
@pytest.mark.parametrize("context", [0, 3, 11])
def test_scores_are_the_pairs_that_the_pattern_allows(pattern: Any, context: int) -> None:
    tokens, context = 9, context if pattern.causal else 0
    q = torch.arange(context, context + tokens)[None]
    k = torch.arange(context + tokens)[None]
    expected = 2 * 3 * int(pattern.mask(q, k).sum())
    assert scores(pattern, 3, Call(batch=2, tokens=tokens, context=context)) == expected


def test_scores_of_an_encoder_whose_heads_differ_are_added_over_them() -> None:
    pattern = PerHead((Full(), Window(1), Window(1), Full()))
    assert scores(pattern, 4, Call(tokens=7)) == 2 * 49 + 2 * 7
    assert scores(pattern & Window(2, 1), 4, Call(tokens=7)) == 2 * (7 + 6 + 6) + 2 * 7


def test_seconds_are_the_larger_of_bytes_over_bandwidth_and_operations_over_rate() -> None:
    cost = Costs(flops=600, weight_bytes=100, state_read=40, state_written=10, state_bytes=0)
    assert cost.seconds(bandwidth=10, rate=1000) == 15
    assert cost.seconds(bandwidth=1000, rate=10) == 60
    with pytest.raises(ValueError, match=r"bandwidth=0 and rate=1 must both be above 0"):
        cost.seconds(0, 1)


def paper(heads: int, kv_heads: int, head_dim: int, hidden: int) -> ModelConfig:
    """Shazeer 2019's translation model: 6 + 6 layers, 18 attentions, 12 feed-forward layers."""
    attention = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    shared = {
        "vocab": 100,
        "dim": 1024,
        "depth": 6,
        "feedforward": {"name": "dense", "hidden": hidden, "activation": "relu"},
        "position": {"name": "learned", "max_context": 256},
    }
    encoder = ModelConfig(kind="encoder", mixer={"name": "bidirectional", **attention}, **shared)
    return ModelConfig(
        kind="seq2seq",
        mixer={"name": "mha", **attention},
        cross={"name": "cross", **attention},
        encoder=encoder,
        **shared,
    )


def language_model(heads: int, kv_heads: int, head_dim: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        vocab=100,
        dim=1024,
        depth=6,
        mixer={"name": "mha", "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim},
        feedforward={"name": "dense", "hidden": hidden, "activation": "relu"},
    )


@pytest.mark.parametrize(
    ("make", "narrow", "hidden", "expected"),
    [
        (paper, (8, 1, 128), 4096, 5440),
        (paper, (1, 1, 128), 4096, 6784),
        (paper, (2, 2, 64), 4096, 6784),
        (paper, (8, 8, 16), 4096, 6784),
        (language_model, (8, 1, 128), 8192, 9088),
        (language_model, (4, 4, 32), 8192, 9984),
    ],
)
def test_widening_the_feed_forward_layers_gives_the_widths_of_the_paper(
    make: Any, narrow: tuple[int, int, int], hidden: int, expected: int
) -> None:
    like = make(8, 8, 128, hidden)
    assert match_ffn_width(make(*narrow, hidden), like) == expected
    assert parameters(skeleton(make(*narrow, expected))) == parameters(skeleton(like))


def test_a_model_too_large_to_match_says_so() -> None:
    with pytest.raises(ValueError, match=r"with feed-forward layers of width 1 the model has \d+ parameters"):
        match_ffn_width(config(depth=9), config(depth=1))


def test_an_encoder_with_a_context_is_refused() -> None:
    model = skeleton(config("bidirectional", kind="encoder", position={"name": "sinusoidal"}))
    with pytest.raises(ValueError, match=r"an encoder reads whole sequences: context=3 must be 0"):
        costs(model, Call(context=3))


def test_a_decoder_that_reads_a_source_needs_its_length() -> None:
    with pytest.raises(ValueError, match=r"needs its source's length; source=0, not at least 1"):
        costs(skeleton(seq2seq()), Call(context=3))


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"tokens": 0}, {"context": -1}, {"itemsize": 0}])
def test_a_call_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=-?\d must be at least [01]"):
        Call(**wrong)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_row_of_the_catalog_states_its_work(name: str) -> None:
    cost = costs(skeleton(config({"name": name})), Call(context=100))
    assert cost.flops > 2 * 50 * 32
    assert cost.state_read > 0


def test_work_adds_up_part_by_part() -> None:
    assert Work(flops=1, weights=2) + Work(flops=3, state_read=4, state_written=5) == Work(
        flops=4, weights=2, state_read=4, state_written=5
    )
