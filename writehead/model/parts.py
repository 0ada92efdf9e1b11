"""What decoders and encoders are made of, built from a config; combinations that cannot work end here with a
sentence."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.catalog import FEEDFORWARDS, MIXERS, PIXELS, POSITIONS, STACKS, argument, build, find, load
from writehead.config import ModelConfig
from writehead.core.bind import Of, itself, product
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice
from writehead.feedforward.dense import ACTIVATIONS
from writehead.mixers.linformer import share_projection
from writehead.positions.base import Scheme, has


class Embedding(nn.Module):
    """Token ids to vectors and back: table, scale, norm, positions and types of tokens, and the output
    matrix."""

    def __init__(self, config: ModelConfig, position: Scheme, table: nn.Parameter | None = None) -> None:
        """Make it; `table` (V, X) shares another's."""
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.vocab, config.dim)) if table is None else table
        if table is None:
            nn.init.normal_(self.table, std=0.02)
        eps = _norm_eps(config)
        self.norm_last = config.embed_norm_last
        self.norm = nn.LayerNorm(config.dim, eps if self.norm_last else 1e-5) if config.embed_norm else None
        self.position = position
        self.types = nn.Parameter(torch.empty(config.token_types, config.dim)) if config.token_types else None
        if self.types is not None:
            nn.init.normal_(self.types, std=0.02)
        width = output_width(config)
        kind = config.head_transform
        self.transform = None if kind is None else Transform(width, kind, eps)
        self.output = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab, width))
        if self.output is not None:
            nn.init.normal_(self.output, std=width**-0.5)
        self.bias = nn.Parameter(torch.zeros(config.vocab)) if config.head_bias else None
        self.scale, self.logit_scale = config.embed_scale, config.logit_scale

    def forward(self, tokens: Tensor, pos: Positions, types: Tensor | None = None) -> Tensor:
        """The vectors that the stack reads.

        Args:
            tokens: (B, T) ids, -1 = padding.
            pos: where they stand.
            types: (B, T) the type of each token; default 0, if the model has types.

        Returns:
            (B, T, X).

        Raises:
            ValueError: a token that the vocabulary does not have, or a type that the model does not have.
        """
        last = int(tokens.max())
        if last >= len(self.table):
            raise ValueError(
                f"token {last} is not in the vocabulary of {len(self.table)} (0 to {len(self.table) - 1})"
            )
        x = F.embedding(tokens.clamp_min(0), self.table)
        if self.scale != 1:
            x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        if self.norm is not None and not self.norm_last:
            x = self.norm(x)
        if self.types is not None or types is not None:
            x = x + self._typed(types)
        places = self.position.embed(pos, x.dtype)
        x = x if places is None else x + places
        return self.norm(x) if self.norm is not None and self.norm_last else x

    def _typed(self, types: Tensor | None) -> Tensor:
        """Vectors of the tokens' types; padding may have any type that there is, or -1."""
        if self.types is None:
            raise ValueError("types were given, but the model has token_types=0")
        if types is None:
            return self.types[0]
        if int(types.max()) >= len(self.types):
            raise ValueError(
                f"type {int(types.max())} is not one of the model's {len(self.types)} token types"
            )
        return F.embedding(types.clamp_min(0), self.types)

    def bind_logits(self, of: Of = itself) -> Callable[[Tensor], Tensor]:
        """`logits` as a plain function."""
        head = product(of, self.table if self.output is None else self.output, self.bias)
        scale = self.logit_scale
        scaled = head if scale == 1 else lambda x: head(x * scale)
        if self.transform is None:
            return scaled
        transform = of(self.transform)
        return lambda x: scaled(transform(x))

    def logits(self, x: Tensor) -> Tensor:
        """x (..., X) -> (..., V)."""
        return self.bind_logits()(x)

    def head(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """y (..., X), weight (V, X) and bias (V,) or None of which `logits` is y weight^T + bias."""
        y = x if self.transform is None else self.transform(x)
        y = y if self.logit_scale == 1 else y * self.logit_scale
        return y, self.table if self.output is None else self.output, self.bias


class Transform(nn.Module):
    """What stands before the output matrix of BERT and its kin: a dense layer, an activation, a LayerNorm."""

    def __init__(self, dim: int, activation: str, eps: float) -> None:
        """Make it; `activation` is one of `feedforward.dense.ACTIVATIONS`."""
        super().__init__()
        check_choice("head_transform", activation, ACTIVATIONS)
        self.inner, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps)
        self.activate = ACTIVATIONS[activation]

    def bind(self, of: Of = itself) -> Callable[[Tensor], Tensor]:
        inner, norm, activate = of(self.inner), of(self.norm), self.activate
        return lambda x: norm(activate(inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., X) -> (..., X)."""
        return self.bind()(x)


def build_embedding(config: ModelConfig, position: Scheme, table: nn.Parameter | None) -> Any:
    """What turns tokens into vectors and vectors into logits: an `Embedding`, or that of pixels.

    Raises:
        ValueError: images that do not fit the config.
    """
    if config.pixels is None:
        return Embedding(config, position, table)
    if output_width(config) != config.dim:
        raise ValueError('a model of pixels reads vectors of width dim: its stack needs output="mean"')
    return build(PIXELS, config.pixels, dim=config.dim, vocab=config.vocab, position=position)


def output_width(config: ModelConfig) -> int:
    """Width of what the stack gives: two streams side by side are twice as wide as the model.

    Raises:
        ValueError: nothing reads so wide an output.
    """
    if argument(STACKS, config.stack, "output") != "concat":
        return config.dim
    if config.kind == "encoder":
        raise ValueError('an encoder gives vectors of width dim: its stack needs output="mean", not "concat"')
    if config.tie_embeddings:
        raise ValueError(
            f'output="concat" makes the last vectors {2 * config.dim} wide, the embeddings have width '
            f'{config.dim}: set tie_embeddings=False, or output="mean"'
        )
    return 2 * config.dim


def build_position(config: ModelConfig) -> Scheme:
    """The model's position scheme, which its layers share.

    Raises:
        ValueError: a scheme that the config's mixers cannot serve.
    """
    row = find(POSITIONS, config.position)
    mixers = [config.layer("mixer", i) for i in range(config.depth)]
    context: dict[str, Any] = {"dim": config.dim, "bidirectional": config.kind == "encoder"}
    for key in {"heads", "head_dim"} & set(inspect.signature(load(row)).parameters):
        values = {_heads_of(config, spec)[key] for spec in mixers}
        if len(values) > 1 or None in values:
            found = ", ".join(sorted(map(str, values)))
            raise ValueError(f"{row.name} positions need one {key} for all layers; the mixers have {found}")
        context[key] = values.pop()
    scheme: Scheme = build(POSITIONS, config.position, **context)
    if any(has(scheme, method) for method in ("infuse", "rotate", "bias")):
        for spec in mixers:
            mixer = find(MIXERS, spec)
            if "position" not in inspect.signature(load(mixer)).parameters:
                raise ValueError(
                    f"{row.name} positions act on queries and keys, but mixer {mixer.name!r} takes no "
                    "position scheme; use sinusoidal, learned or none"
                )
    ordered = any(getattr(load(find(MIXERS, spec)), "ordered", False) for spec in mixers)
    if config.kind == "encoder" and row.name == "none" and not ordered:
        raise ValueError(
            "an encoder without positions cannot tell the order of its tokens, unless a mixer does (etc); "
            f"use one of {', '.join(name for name in POSITIONS if name != 'none')}"
        )
    return scheme


def build_stack(config: ModelConfig, position: Scheme) -> nn.Module:
    """The layers between embedding and output.

    Raises:
        ValueError: a mixer that cannot decode in a decoder or cannot encode in an encoder.
    """
    layers = []
    chosen = getattr(load(find(STACKS, config.stack)), "mixers_of", None)  # a stack may choose its mixers
    specs = [config.layer("mixer", i) for i in range(config.depth)] if chosen is None else chosen(config)
    for index, spec in enumerate(specs):
        row = find(MIXERS, spec)
        if row.target.startswith("mixers.cross:"):
            raise ValueError(
                "cross-attention reads an encoder: give it as `cross` of a seq2seq config, not as a mixer"
            )
        mixer = build(MIXERS, spec, dim=config.dim, position=position)
        causal = getattr(mixer, "pattern", None) is None or mixer.pattern.causal
        if config.kind == "encoder" and not hasattr(mixer, "encode"):
            raise ValueError(f"mixer {row.name!r} has no bidirectional form; it serves decoders only")
        if config.kind == "encoder" and chosen is not None:
            raise ValueError(f"the {config.stack['name']} stack decodes; it serves decoders only")
        if config.kind != "encoder" and chosen is None and (not hasattr(mixer, "init_state") or not causal):
            raise ValueError(
                f"mixer {row.name!r} reads tokens after the query, so it cannot decode; it serves encoders"
            )
        feedforward = build(FEEDFORWARDS, config.layer("feedforward", index), dim=config.dim)
        cross = None if config.cross is None else build(MIXERS, config.cross, dim=config.dim)
        layers.append((mixer, feedforward, cross))
    share_projection(mixer for mixer, _, _ in layers)
    stack: nn.Module = build(STACKS, config.stack, dim=config.dim, layers=layers)
    return stack


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer by name, one that several modules share only once."""
    kept = set(model.state_dict(keep_vars=True))
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in kept}


def _norm_eps(config: ModelConfig) -> float:
    """The epsilon of the stack's norms."""
    eps: float = argument(STACKS, config.stack, "eps")
    return eps


def _heads_of(config: ModelConfig, spec: Any) -> dict[str, Any]:
    heads = argument(MIXERS, spec, "heads")
    head_dim = argument(MIXERS, spec, "head_dim")
    return {"heads": heads, "head_dim": head_dim or (config.dim // heads if heads else None)}
