"""Sinusoidal positions, added to the embeddings (Vaswani et al. 2017) or infused into queries and keys
(Shortformer).

Paper     Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762; Press, Smith, Lewis 2020,
          "Shortformer", arXiv:2012.15832
Equation  PE[p, 2i] = sin(p / base^(2i/X)), PE[p, 2i+1] = cos(p / base^(2i/X))
State     none: a token's position is enough
Cost      O(X) a token
Decodes   exactly, at any position
Differs   layout "concatenated" puts all sines before all cosines with exponents i / (X/2 - 1), as fairseq
          does
"""

import torch
from torch import Tensor

from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_multiple
from writehead.positions.base import Scheme


class Sinusoidal(Scheme):
    """A fixed wave for every position, added once to the token embeddings."""

    def __init__(self, dim: int, *, layout: str = "interleaved", base: float = 10000.0) -> None:
        super().__init__()
        check_multiple("dim", dim, "two", 2)
        check_choice("layout", layout, ("interleaved", "concatenated"))
        self.dim, self.layout, self.base = dim, layout, base

    def wave(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """index (B, T) -> (B, T, X)."""
        half, wide = self.dim // 2, torch.promote_types(dtype, torch.float32)
        steps = torch.arange(half, device=index.device, dtype=wide)
        span = half if self.layout == "interleaved" else max(half - 1, 1)
        angles = index.clamp_min(0).to(wide)[..., None] * self.base ** (-steps / span)
        waves = (angles.sin(), angles.cos())
        whole = torch.stack(waves, -1).flatten(-2) if self.layout == "interleaved" else torch.cat(waves, -1)
        return whole.to(dtype)

    def embed(self, pos: Positions, dtype: torch.dtype) -> Tensor:
        return pos.once(self.wave, pos.index, dtype)


class PositionInfused(Scheme):
    """The sinusoidal wave is added to what makes queries and keys, in every layer; never to values or the
    residual."""

    def __init__(self, dim: int, *, layout: str = "interleaved", base: float = 10000.0) -> None:
        super().__init__()
        self.sinusoidal = Sinusoidal(dim, layout=layout, base=base)

    def infuse(self, x: Tensor, pos: Positions) -> Tensor:
        return x + pos.once(self.sinusoidal.wave, pos.index, x.dtype)
