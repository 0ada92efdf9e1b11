"""Training on long sequences: a layer with a window beside dense attention and beside other packages' layers,
and a whole model in bounded memory. Every case runs in a process of its own, as in `scaling`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.bench.scaling import WINDOW, Growth, alone, clock
from writehead.catalog import MIXERS, build
from writehead.config import ModelConfig
from writehead.core.heads import QKV
from writehead.core.pattern import Window
from writehead.core.positions import Positions
from writehead.model.decoder import Decoder
from writehead.ops.blocks import block_attend
from writehead.ops.chunked_loss import chunked_loss

Run = Callable[[Tensor], Tensor]
CAUSAL, SIDES, BARE = "causal", "both sides", "without projections"
VOCAB = 256


def _ours(spec: Mapping[str, Any], encodes: bool, heads: int, head_dim: int) -> Run:
    mixer = build(MIXERS, {**spec, "heads": heads}, dim=heads * head_dim, position=None)

    def run(x: Tensor) -> Tensor:
        pos = Positions.range(1, 0, x.shape[1])
        y: Tensor = mixer.encode(x, pos)[0] if encodes else mixer(x, pos)[0]
        return y

    return run


class _Around(nn.Module):
    """Somebody's attention of q, k, v (B, H, T, D), between projections as ours has them."""

    def __init__(self, attention: Callable[..., Tensor], heads: int, head_dim: int) -> None:
        super().__init__()
        dim = heads * head_dim
        self.attention, self.qkv, self.out = attention, QKV(dim, heads), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, v = self.qkv(x)
        q, k = heads.chunk(2, 2)
        y = self.attention(*(t.transpose(1, 2) for t in (q, k, v)))
        projected: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return projected


def _dense(causal: bool, heads: int, head_dim: int) -> Run:
    return _Around(partial(F.scaled_dot_product_attention, is_causal=causal), heads, head_dim)


def _bare(attention: Callable[..., Tensor], heads: int, head_dim: int) -> Run:
    """Attention of q = k = v = x, (B, T, H, D) each: no projections around it."""

    def run(x: Tensor) -> Tensor:
        each = x.unflatten(2, (heads, head_dim))
        return attention(each, each, each).flatten(2)

    return run


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _local_attention(heads: int, head_dim: int) -> Run:
    package = import_module("local_attention")
    layer = package.LocalAttention(
        dim=head_dim,
        window_size=WINDOW,
        causal=True,
        look_forward=0,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
        autopad=True,
    )
    return _Around(layer, heads, head_dim)


def _longformer(heads: int, head_dim: int) -> Run:
    models = import_module("transformers.models.longformer.modeling_longformer")
    dim = heads * head_dim
    config = models.LongformerConfig(
        hidden_size=dim, num_attention_heads=heads, num_hidden_layers=1, attention_window=[WINDOW],
        attention_probs_dropout_prob=0.0, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    layer, out = models.LongformerSelfAttention(config, layer_id=0), nn.Linear(dim, dim)

    def run(x: Tensor) -> Tensor:
        nothing = torch.zeros(x.shape[:2])
        y = layer(
            x,
            attention_mask=nothing,
            is_index_masked=nothing > 0,
            is_index_global_attn=nothing > 0,
            is_global_attn=False,
        )[0]
        projected: Tensor = out(y)
        return projected

    return run


LAYERS: Mapping[str, tuple[str, Callable[[int, int], Run]]] = {
    "window": (
        CAUSAL,
        partial(_ours, {"name": "local_mha", "pattern": {"name": "window", "window": WINDOW}}, False),
    ),
    "window, one write-head": (
        CAUSAL,
        partial(_ours, {"name": "local_mqa", "pattern": {"name": "window", "window": WINDOW}}, False),
    ),
    "local-attention": (CAUSAL, _local_attention),
    "dense SDPA": (CAUSAL, partial(_dense, True)),
    "window, no projections": (BARE, partial(_bare, partial(block_attend, pattern=Window(WINDOW)))),
    "dense SDPA, no projections": (BARE, partial(_bare, _sdpa)),
    "longformer": (SIDES, partial(_ours, {"name": "longformer", "window": WINDOW, "tokens": 0}, True)),
    "transformers' Longformer": (SIDES, _longformer),
    "dense SDPA, both sides": (SIDES, partial(_dense, False)),
}  # fmt: skip


def layer(
    name: str, tokens: int, heads: int, head_dim: int, threads: int, rounds: int
) -> tuple[float, float, int]:
    """Seconds of forward, seconds of forward and backward, bytes; in the process that calls it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run, x = LAYERS[name][1](heads, head_dim), torch.randn(1, tokens, heads * head_dim, requires_grad=True)
    return clock(partial(run, x), torch.randn(x.shape), rounds)


def beside_peers(
    names: Iterable[str],
    tokens: int,
    *,
    heads: int = 8,
    head_dim: int = 64,
    threads: int = 1,
    rounds: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> list[Growth]:
    """Measure a training step of each layer on one row of `tokens` tokens.

    Args:
        names: of `LAYERS`.
        tokens: T.
        heads, head_dim: of the layer; its width is their product.
        threads: of torch.
        rounds: calls of each, of which the fastest counts.
        say: told what happens, before it happens.
    """
    found = []
    for name in names:
        say(f"{name}, {tokens} tokens")
        found.append(alone(name, tokens, layer, name, tokens, heads, head_dim, threads, rounds))
    return found


def ratios(cells: Sequence[Growth]) -> dict[str, dict[str, float]]:
    """How often ours fits into each other layer's step of the same kind takes, where both were timed."""
    ours = {CAUSAL: "window", SIDES: "longformer", BARE: "window, no projections"}
    seconds = {cell.name: cell.both_s for cell in cells if not cell.error}
    found: dict[str, dict[str, float]] = {}
    for name, (kind, _) in LAYERS.items():
        if name in seconds and ours[kind] in seconds and name != ours[kind]:
            found.setdefault(ours[kind], {})[name] = seconds[name] / seconds[ours[kind]]
    return found


def _config(kv_heads: int, depth: int, dim: int) -> ModelConfig:
    mixer: dict[str, Any] = {
        "name": "local_mha",
        "heads": 4,
        "kv_heads": kv_heads,
        "pattern": {"name": "window", "window": WINDOW},
    }
    return ModelConfig(vocab=VOCAB, dim=dim, depth=depth, mixer=mixer, position={"name": "rotary"})


def model(
    kv_heads: int, tokens: int, threads: int, depth: int = 4, dim: int = 256
) -> tuple[float, float, int]:
    """One training step of a whole model on one row: seconds of forward, of both, and the bytes that the
    process grew by, gradients included."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    decoder, text = Decoder(_config(kv_heads, depth, dim)), torch.randint(0, VOCAB, (1, tokens + 1))

    def run() -> Tensor:
        hidden, _ = decoder.whole(text[:, :-1])
        return chunked_loss(decoder.logits, hidden, text[:, 1:])

    return clock(run, torch.ones(()), 1)


def models(tokens: int, *, threads: int = 1, say: Callable[[str], None] = lambda text: None) -> list[Growth]:
    """Measure a training step of models with 4 heads and with one write-head.

    Args:
        tokens: T of the one row.
        threads: of torch.
        say: told what happens, before it happens.
    """
    found = []
    for name, kv_heads in (("4 key/value heads", 4), ("one write-head", 1)):
        say(f"a model with {name}, {tokens} tokens")
        found.append(alone(name, tokens, model, kv_heads, tokens, threads))
    return found
