"""The interface of position schemes: each overrides one of four methods, the others change nothing ("none").

Paper     Haviv et al. 2022, "Transformer Language Models without Positional Encodings Still Learn Positional
          Information", arXiv:2203.16634
Equation  score(q, k) = q.k / sqrt(D): a causal model can tell order by how many tokens each one reads
State     none
Cost      none
Decodes   exactly, at any position
Differs   nothing; an encoder is refused unless a mixer tells order by itself (`etc`)
"""

import torch
from torch import Tensor, nn

from writehead.core.positions import Positions


class Scheme(nn.Module):
    """How a model knows where its tokens stand; this one does not tell it ("none": a causal model can still
    count).

    Attributes:
        max_context: the first position that does not exist; None = any position.
        relative: its bias depends on the distance of query and key only.
    """

    max_context: int | None = None
    relative: bool = False

    def __init__(self) -> None:
        super().__init__()

    def embed(self, pos: Positions, dtype: torch.dtype) -> Tensor | None:
        """(B, T, X) to add to the token embeddings, or None."""
        return None

    def infuse(self, x: Tensor, pos: Positions) -> Tensor | None:
        """What queries and keys are made of instead of x (B, T, X), or None; values always come from x."""
        return None

    def rotate(self, heads: Tensor, pos: Positions) -> Tensor:
        """Query and key heads (B, T, H, D), turned by their positions before keys are cached."""
        return heads

    def bias(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor | None:
        """(B, H, T, S) to add to the scores of queries at q (B, T) and keys at k (B, S), or None."""
        return None

    def check_context(self, pos: Positions) -> None:
        """Raise if a token stands where the scheme has no position.

        Raises:
            ValueError: naming the position and the limit.
        """
        if self.max_context is not None:
            last = pos.once(_last, pos.index)
            if last >= self.max_context:
                raise ValueError(
                    f"position {last} does not exist: this model has {self.max_context} positions "
                    f"(0 to {self.max_context - 1}); shorten the prompt or the continuation"
                )


class NoPosition(Scheme):
    """No positions at all."""


def _last(index: Tensor) -> int:
    return int(index.max()) if index.numel() else -1


def has(scheme: Scheme, method: str) -> bool:
    """Does the scheme's class override that method of `Scheme`?"""
    return getattr(type(scheme), method) is not getattr(Scheme, method)
