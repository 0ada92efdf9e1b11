"""A bidirectional model: tokens in, one vector a token out."""

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

    def forward(self, tokens: Tensor) -> tuple[Tensor, Positions, Aux]:
        """tokens (B, T), -1 = padding anywhere -> vectors (B, T, X), where they stand, auxiliary values."""
        check_shape("tokens", tokens, "B T")
        valid = tokens >= 0
        pos = Positions(torch.where(valid, valid.cumsum(1) - 1, -1))
        x, aux = self.stack.encode(self.embedding(tokens, pos), pos)  # type: ignore[operator]
        return x, pos, aux
