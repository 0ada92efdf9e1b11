"""A bidirectional model: tokens in, one vector a token out."""

from typing import Any

import torch
from torch import Tensor, nn

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.core.shapes import check_shape
from writehead.mixer import Aux
from writehead.model.parts import Embedding, build_position, build_stack


class Encoder(nn.Module):
    """The model that a config of kind "encoder" describes."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the model with fresh weights.

        Raises:
            ValueError: a config whose parts do not fit together.
        """
        super().__init__()
        if config.kind != "encoder":
            raise ValueError(f"this config describes a {config.kind}; Encoder builds encoders")
        self.config = config
        position = build_position(config)
        self.embedding = Embedding(config, position)
        self.stack = build_stack(config, position)

    def forward(
        self, tokens: Tensor, types: Tensor | None = None, owners: Tensor | None = None
    ) -> tuple[Tensor, Positions, Aux]:
        """Read whole sequences.

        Args:
            tokens: (B, T) ids, -1 = padding anywhere.
            types: (B, T) the type of each token, for models with `token_types`; default 0.
            owners: (B, T) int64, the column of the global token to which each long token belongs (the
                sentence of a word), -1 = none; for models of mixers that read it (`etc`). Every token then
                stands at its column, so that a global token may be absent: padding in its place.

        Returns:
            Vectors (B, T, X), where they stand, auxiliary values.

        Raises:
            ValueError: a shape, token, type or position that the model does not have, or owners that no
                mixer reads.
        """
        check_shape("tokens", tokens, "B T")
        if types is not None:
            check_shape("types", types, "B T", B=len(tokens), T=tokens.shape[1])
        valid = tokens >= 0
        if owners is None:
            pos = Positions(torch.where(valid, valid.cumsum(1) - 1, -1))
        else:
            self._check_owners(owners, tokens)
            columns = torch.arange(tokens.shape[1], device=tokens.device)
            pos = Positions(torch.where(valid, columns, -1))
            pos.streams["owners"] = owners
        x, aux = self.stack.encode(self.embedding(tokens, pos, types), pos)  # type: ignore[operator]
        return x, pos, aux

    def _check_owners(self, owners: Tensor, tokens: Tensor) -> None:
        check_shape("owners", owners, "B T", B=len(tokens), T=tokens.shape[1])
        blocks: Any = self.stack.blocks
        if not any("owners" in getattr(block.mixer, "reads", ()) for block in blocks):
            raise ValueError("owners were given, but none of the model's mixers reads them; `etc` does")

    def logits(self, x: Tensor) -> Tensor:
        """The vectors (..., X) -> (..., V): what a masked token may have been."""
        return self.embedding.logits(x)
