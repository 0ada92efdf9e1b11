"""What the native engine covers, and a model's outline as it needs it."""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from writehead.catalog import FEEDFORWARDS, argument
from writehead.config import ModelConfig
from writehead.core.norm import RMS
from writehead.core.pattern import And, Causal, Full, Leading, Or, Pattern, Window
from writehead.core.slots import Layout, Store
from writehead.feedforward.dense import Chunked, Dense
from writehead.mixers.softmax import Softmax
from writehead.model.blank import blank
from writehead.native.outline import Kept, Layer, Normal, Outline, Rotation
from writehead.positions.alibi import ALiBi
from writehead.positions.base import NoPosition, Scheme, has
from writehead.positions.learned import Learned
from writehead.positions.rope import Rotary
from writehead.positions.sinusoidal import Sinusoidal
from writehead.stacks.residual import Residual

SCHEMES = (NoPosition, Learned, Sinusoidal, Rotary, ALiBi)
PIECES = (16, 128)  # tokens a row that one call of a model with windows takes: at least, at most


class NotCoveredError(ValueError):
    """A model that the native engine does not run; PyTorch does."""


class Covered(NamedTuple):
    """A model's outline, and its scheme of positions."""

    outline: Outline
    position: Scheme


def why_not(config: ModelConfig) -> str | None:
    """Why the native engine does not cover a model, in words; None if it does."""
    try:
        cover(config)
    except NotCoveredError as reason:
        return str(reason)
    return None


def cover(config: ModelConfig) -> Covered:
    """The model of a config as the native engine sees it.

    Raises:
        NotCoveredError: one that it does not run, saying why.
    """
    if config.kind != "decoder":
        raise NotCoveredError(f"the native engine runs decoders; this model is of kind {config.kind!r}")
    if config.pixels is not None:
        raise NotCoveredError("the native engine runs models of tokens; this one is of images")
    model: Any = blank(config)
    position = model.embedding.position
    if type(position) not in SCHEMES:
        raise NotCoveredError(f"the native engine has no {config.position['name']} positions")
    if type(model.stack) is not Residual:
        raise NotCoveredError(f"the native engine has no {config.stack['name']} stack")
    for key in ("embed_norm_last", "token_types", "head_transform"):
        if getattr(config, key):
            raise NotCoveredError(f"the native engine has no {key}; this model has {getattr(config, key)!r}")
    blocks = list(model.blocks)
    if blocks[0].order == "post":
        raise NotCoveredError(
            "the native engine normalises before each part of a layer; this model does so after"
        )
    reaches = [_reach(block.mixer, config, i) for i, block in enumerate(blocks)]
    windows = [window for window, _ in reaches if window]
    piece = max(PIECES[0], min(PIECES[1], *windows)) if windows else None
    caches: dict[Kept, int] = {}
    places: list[tuple[Kept, int]] = []
    for block in blocks:
        kept = _kept(block.mixer, piece)
        places.append((kept, caches.setdefault(kept, 0)))
        caches[kept] += 1
    order = list(caches)
    layers = [
        _layer(config, i, block, reach, order.index(kept), place)
        for i, (block, reach, (kept, place)) in enumerate(zip(blocks, reaches, places, strict=True))
    ]
    outline = Outline(
        vocab=config.vocab,
        dim=config.dim,
        tied=config.tie_embeddings,
        embed_scale=float(config.embed_scale),
        logit_scale=float(config.logit_scale),
        layers=tuple(layers),
        caches=tuple(replace(kept, layers=caches[kept]) for kept in order),
        parallel=blocks[0].order == "parallel",
        embed_norm=_normal(model.embedding.norm, "embedding.norm"),
        last_norm=_normal(model.stack.norm, "stack.norm"),
        rotation=_rotation(position) if isinstance(position, Rotary) else None,
        slopes=tuple(map(float, position.slope_list)) if isinstance(position, ALiBi) else (),
        places=_places(position),
        positions=position.max_context,
        trained_context=config.max_context,
        piece=piece,
    )
    return Covered(outline, position)


def _rotation(position: Rotary) -> Rotation:
    frequencies = tuple(position.frequencies.tolist())
    return Rotation(position.rotary_dim, position.pairs == "interleaved", frequencies, float(position.gain))


def _places(position: Scheme) -> str:
    if isinstance(position, Learned):
        return "table"
    return "function" if has(position, "embed") else "none"


def _layer(config: ModelConfig, i: int, block: Any, reach: tuple[int, int], cache: int, place: int) -> Layer:
    name, feed = f"stack.blocks.{i}", block.feedforward
    spec = config.layer("feedforward", i)
    if type(feed) not in (Dense, Chunked):
        raise NotCoveredError(f"the native engine has no {spec['name']} feed-forward layer (layer {i})")
    dense = feed.dense if isinstance(feed, Chunked) else feed
    shared = block.feedforward_norm is None
    norms = (
        _normal(block.mixer_norm, f"{name}.mixer_norm"),
        _normal(
            *(
                (block.mixer_norm, f"{name}.mixer_norm")
                if shared
                else (block.feedforward_norm, f"{name}.feedforward_norm")
            )
        ),
        _normal(block.mixer.qkv.q_norm, f"{name}.mixer.qkv.q_norm"),
        _normal(block.mixer.qkv.k_norm, f"{name}.mixer.qkv.k_norm"),
    )
    return Layer(
        name,
        f"{name}.feedforward" + (".dense" if dense is not feed else ""),
        norms,
        float(block.mixer.scale),
        *reach,
        cache,
        place,
        dense.outer.in_features,
        argument(FEEDFORWARDS, spec, "activation"),
        dense.gated,
    )


def _kept(mixer: Softmax, piece: int | None) -> Kept:
    qkv, layout = mixer.qkv, Layout.of(mixer.pattern.reach, Store())
    assert layout.columns is None
    return Kept(0, qkv.heads, qkv.kv_heads, qkv.head_dim, layout.lead, layout.window, piece or 1)


def _reach(mixer: nn.Module, config: ModelConfig, layer: int) -> tuple[int, int]:
    name = config.layer("mixer", layer)["name"]
    if type(mixer) is not Softmax:
        raise NotCoveredError(f"the native engine has no {name} (layer {layer}); it runs softmax attention")
    reach = window_and_lead(mixer.pattern)
    if reach is None:
        raise NotCoveredError(
            "the native engine reads all keys, a window, or a window and the first keys; "
            f"layer {layer} reads {mixer.pattern}"
        )
    return reach


def window_and_lead(pattern: Pattern) -> tuple[int, int] | None:
    """A causal pattern as the last `window` keys (0: all) and the first `lead`; None if it is another one."""
    if isinstance(pattern, Causal):
        return 0, 0
    if isinstance(pattern, Window):
        return (pattern.window, 0) if pattern.after == 0 else None
    if not isinstance(pattern, And) or Causal() not in (pattern.a, pattern.b):
        return None
    other = pattern.b if pattern.a == Causal() else pattern.a
    if isinstance(other, Full | Causal):
        return 0, 0
    if isinstance(other, Window):
        return other.window, 0
    if isinstance(other, Or):
        parts = (other.a, other.b)
        window = next((p for p in parts if isinstance(p, Window)), None)
        leading = next((p for p in parts if isinstance(p, Leading)), None)
        if window is not None and leading is not None:
            return window.window, leading.count
    return None


def _normal(norm: nn.Module | None, name: str) -> Normal:
    if isinstance(norm, RMS):
        return Normal("rms", float(norm.eps), name)
    if isinstance(norm, nn.LayerNorm):
        return Normal("layer", float(norm.eps), name)
    assert norm is None or isinstance(norm, nn.Identity)
    return Normal("none", 0.0, name)
