"""LSH attention against length, beside other LSH layers and dense attention; the price of a reversible stack.

All layers have the same width, heads, rounds and chunks, and about two buckets for each chunk. Every figure
is seconds of a forward pass with its backward pass.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from writehead.bench.measure import Case, Timing, alternate
from writehead.catalog import MIXERS, build
from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.model.decoder import Decoder

DIM, HEADS, CHUNK, ROUNDS = 256, 4, 64, 2
SHORT, LONGEST = (
    (1024, 2048, 4096),
    65536,
)  # lengths at which dense attention is measured too; the last of ours


def buckets(tokens: int) -> list[int]:
    """Two powers of two whose product is about twice the number of chunks."""
    power = max(2, (2 * tokens // CHUNK).bit_length() - 1)
    return [1 << power // 2, 1 << power - power // 2]


def layers(tokens: int, names: Sequence[str]) -> dict[str, Case]:
    """A call forwards and backwards of each named layer; those whose package is absent are left out."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, tokens, DIM, requires_grad=True), torch.randn(1, tokens, DIM)
    makers = {"writehead": _ours, "dense": _dense, "transformers": _transformers, "reformer-pytorch": _lucid}
    cases: dict[str, Case] = {}
    for name in names:
        if name not in ("transformers", "reformer-pytorch") or importlib.util.find_spec(
            name.replace("-", "_")
        ):
            cases[name] = _both(makers[name](tokens), x, weight)
    return cases


def _both(layer: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Case:
    def run() -> None:
        layer(x).backward(weight)

    return run


def _ours(tokens: int) -> Callable[[Tensor], Tensor]:
    spec = {"name": "reformer", "heads": HEADS, "window": CHUNK, "rounds": ROUNDS, "buckets": buckets(tokens)}
    mixer = build(MIXERS, spec, dim=DIM)
    return lambda x: mixer.whole(x, Positions.range(1, 0, tokens))[0]


def _dense(tokens: int) -> Callable[[Tensor], Tensor]:
    mixer = build(MIXERS, {"name": "mha", "heads": HEADS}, dim=DIM)
    return lambda x: mixer(x, Positions.range(1, 0, tokens))[0]


def _transformers(tokens: int) -> Callable[[Tensor], Tensor]:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    layer = LSHSelfAttention(
        ReformerConfig(
            hidden_size=DIM, num_attention_heads=HEADS, attention_head_size=DIM // HEADS, attn_layers=["lsh"],
            lsh_attn_chunk_length=CHUNK, num_buckets=buckets(tokens), num_hashes=ROUNDS, is_decoder=True,
            lsh_attention_probs_dropout_prob=0.0, max_position_embeddings=tokens,
        )
    )  # fmt: skip
    out = nn.Linear(DIM, DIM, bias=False)
    return lambda x: out(layer(x).hidden_states)


def _lucid(tokens: int) -> Callable[[Tensor], Tensor]:
    theirs = import_module("reformer_pytorch").LSHSelfAttention
    layer = theirs(dim=DIM, heads=HEADS, bucket_size=CHUNK, n_hashes=ROUNDS, causal=True)
    return lambda x: layer(x)


def stacks(depth: int = 8, dim: int = 128, tokens: int = 512) -> dict[str, Case]:
    """A decoder's passes with either stack, of LSH and local layers."""
    cases: dict[str, Case] = {}
    for stack in ("residual", "reversible"):
        torch.manual_seed(0)
        config = ModelConfig(
            vocab=256, dim=dim, depth=depth, position={"name": "sinusoidal"}, stack={"name": stack},
            mixer=({"name": "local_mha", "heads": 4}, {"name": "reformer", "heads": 4, "buckets": 16}),
        )  # fmt: skip
        model, ids = Decoder(config), torch.randint(256, (4, tokens))
        cases[stack] = _step(model, ids)
    return cases


def _step(model: Decoder, ids: Tensor) -> Case:
    def run() -> None:
        model(ids)[0].square().mean().backward()

    return run


def measure(
    lengths: Sequence[int] = (4096, 16384, LONGEST), beside: int = 16384, rounds: int = 3
) -> dict[str, Any]:
    """All of it.

    Args:
        lengths: of our layer, for the slope.
        beside: the length at which other packages' layers are measured in turns with ours.
        rounds: samples of each.
    """

    def run(cases: dict[str, Case]) -> dict[str, Timing]:
        return alternate(cases, rounds, min_seconds=0.05, max_rounds=rounds)

    alone = {tokens: run(layers(tokens, ["writehead"]))["writehead"] for tokens in lengths}
    short, long = min(lengths), max(lengths)
    found = run(stacks())
    return {
        "seconds by length": {str(tokens): timing for tokens, timing in alone.items()},
        "slope": math.log(alone[long].median / alone[short].median) / math.log(long / short),
        f"at {beside}": run(layers(beside, ["writehead", "transformers", "reformer-pytorch"])),
        "beside dense": {str(tokens): run(layers(tokens, ["writehead", "dense"])) for tokens in SHORT},
        "stacks": found,
        "reversible over residual": found["reversible"].median / found["residual"].median,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as text, a line each; seconds are medians."""
    said = []
    for name, value in found.items():
        if isinstance(value, float):
            said.append(f"{name}: {value:.2f}")
            continue
        for key, timing in value.items():
            cells = timing.items() if isinstance(timing, dict) else [("", timing)]
            said += [f"{name}, {key} {case}: {one.median:.3f} s".replace(" :", ":") for case, one in cells]
    return said
