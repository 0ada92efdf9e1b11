"""Where the tokens of one call stand, and the work that its layers share."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from writehead.core.shapes import check_shape
from writehead.core.state import Once

R = TypeVar("R")


class Positions:
    """Absolute positions of T new tokens in each of B rows.

    Rotary angles, masks and cache slots follow from positions alone, so `once` computes each for the first
    layer that asks and hands it to the others. One value serves one call of a model.

    Attributes:
        index: (B, T) int64, -1 = padding; within a row the positions of real tokens rise.
        streams: what goes by name from layer to layer beside x: handed on by layers, such as Luna's slots, or
            said of the tokens by the caller, such as ETC's owners.
    """

    def __init__(self, index: Tensor) -> None:
        check_shape("pos", index, "B T")
        self.index = index
        self.streams: dict[str, Tensor] = {}
        self._once = Once()
        self._start: int | None = None
        self._known = False

    @classmethod
    def range(cls, batch: int, start: int, stop: int, device: torch.device | str = "cpu") -> "Positions":
        """start, ..., stop - 1 in every row."""
        positions = cls(torch.arange(start, stop, device=device).expand(batch, -1))
        positions._start, positions._known = start, True
        return positions

    def once(self, function: Callable[..., R], *args: Any) -> R:
        """function(*args), computed for the first layer that asks in this call; tensors compare by
        identity."""
        return self._once(function, *args)

    def settle(self, graph: bool = True) -> None:
        """Forget what carries a gradient or belongs to one layer, before a layer is computed once more.

        Args:
            graph: was autograd on in what was computed so far?
        """
        self.streams = {}
        self._once.settle(self.index, graph)

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: not padding."""
        return self.once(torch.ge, self.index, 0)

    @property
    def start(self) -> int | None:
        """s if every row holds s, s + 1, ..., s + T - 1 without padding, else None (reads the device
        once)."""
        if not self._known:
            first = int(self.index[0, 0]) if self.index.numel() else -1
            steps = torch.arange(first, first + self.index.shape[1], device=self.index.device)
            self._start = first if first >= 0 and bool((self.index == steps).all()) else None
            self._known = True
        return self._start

    @property
    def in_place(self) -> bool:
        """Does token t of each row stand at position t or nowhere: prompts from their beginning, padded at
        the end?"""
        return self.once(_in_place, self.index)


def _in_place(index: Tensor) -> bool:
    return bool(((index == torch.arange(index.shape[1], device=index.device)) | (index < 0)).all())


def advance(tokens: Tensor, next_pos: Tensor) -> tuple[Positions, Tensor]:
    """Number new tokens after those that each row has seen.

    Args:
        tokens: (B, T) token ids, negative = padding.
        next_pos: (B,) the position that each row's next token takes.

    Returns:
        The positions of the tokens, and (B,) the next position after them.
    """
    valid = tokens >= 0
    count = valid.cumsum(1)
    index = torch.where(valid, next_pos[:, None] + count - 1, -1)
    return Positions(index), next_pos + count[:, -1]
