"""What a law is tried on: a mixer made ready, the tokens it is fed, and how far two values are apart."""

import math
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import State

TOLERANCE = 1e-9

Findings = Iterator[tuple[str, float]]  # what was compared, and how far the two sides are apart


class BrokenError(Exception):
    """A law does not hold, for a reason that is no number."""


@dataclass(frozen=True)
class Tokens:
    """What a mixer is fed."""

    x: Tensor  # (B, T, X)
    index: Tensor  # (B, T), -1 = padding

    @property
    def valid(self) -> Tensor:
        return self.index >= 0

    def rows(self, rows: Sequence[int]) -> "Tokens":
        return Tokens(self.x[list(rows)], self.index[list(rows)])

    def split(self, sizes: Sequence[int]) -> list["Tokens"]:
        pieces = zip(self.x.split(list(sizes), 1), self.index.split(list(sizes), 1), strict=True)
        return [Tokens(*piece) for piece in pieces]


class Draw:
    """Random tokens and cuts, from a seed."""

    def __init__(self, seed: int, dim: int) -> None:
        self.plain, self.dim = random.Random(seed), dim
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, length: int, after: Tokens | None = None, ragged: bool = True) -> Tokens:
        """Three rows: one full, one with gaps, one that begins late and has gaps."""
        valid = torch.rand(3, length, generator=self.generator) < 0.8
        valid[0] = True
        valid[2, : length // 4] = False
        if not ragged:
            valid = torch.ones_like(valid)
        before = 0 if after is None else after.index.amax(1, keepdim=True) + 1
        return Tokens(self.normal(3, length, self.dim), torch.where(valid, valid.cumsum(1) - 1 + before, -1))

    def pieces(self, length: int, parts: int) -> list[int]:
        """`length` as a sum of that many random sizes."""
        borders = [0, *sorted(self.plain.sample(range(1, length), parts - 1)), length]
        return [b - a for a, b in pairwise(borders)]


class Subject:
    """A mixer ready for the laws: copied, in float64, disturbed, with a memory to read where it needs one."""

    def __init__(self, mixer: Any, draw: Draw, store: Store, decodes: str | None, length: int) -> None:
        self.mixer, self.store, self.decodes, self.length = deepcopy(mixer), store, decodes, length
        self.parameters: dict[str, Tensor] = {}
        if isinstance(self.mixer, nn.Module):
            self.mixer.double().eval()
            self.parameters = {n: p for n, p in self.mixer.named_parameters() if p.requires_grad}
            with torch.no_grad():
                for p in self.parameters.values():
                    p += 0.3 * draw.normal(*p.shape)
        self.like = draw.normal(1)
        self.reads = hasattr(self.mixer, "remember")
        self.sources = [draw.normal(1, length, draw.dim) for length in (5, 9, 7)]
        # gradients of keys stored in fewer bits are rounded too, and add up in the order of the calls
        self.exact = store.dtype in (None, torch.float64)
        # what padded tokens carry; in float16 more would be infinite in the cache
        self.garbage = 30.0 if store.dtype == torch.float16 else 1e6

    def start(self, rows: Sequence[int], store: Store | None = None, pads: int = 0) -> State:
        """The empty past of some of the rows 0, 1, 2; `pads` tokens of padding go into each one's source."""
        if not self.reads:
            return self.mixer.init_state(len(rows), self.like, store or self.store)
        sources = [self.sources[row] for row in rows]
        longest = max(source.shape[1] for source in sources) + pads
        x = torch.full(
            (len(rows), longest, self.sources[0].shape[-1]), self.garbage if pads else 1.0
        ).double()
        index = torch.full(x.shape[:2], -1)
        for i, source in enumerate(sources):
            length = source.shape[1]
            at = torch.arange(length) + (torch.arange(length) + i >= 3) * pads
            x[i, at], index[i, at] = source[0], torch.arange(length)
        return self.mixer.remember(x, Positions(index))

    def run(self, tokens: Tokens, state: State, sizes: Sequence[int] | None = None) -> tuple[Tensor, State]:
        """Outputs (B, T, X) and the state after them, in one call or in calls of the given sizes."""
        outputs = []
        for piece in tokens.split(sizes or [tokens.x.shape[1]]):
            y, state, _ = self.mixer(piece.x, Positions(piece.index), state)
            if y.shape != piece.x.shape:
                raise BrokenError(f"outputs of shape {tuple(y.shape)} for tokens {tuple(piece.x.shape)}")
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def encode(self, tokens: Tokens) -> Tensor:
        y: Tensor = self.mixer.encode(tokens.x, Positions(tokens.index))[0]
        return y

    def gradients(self, value: Tensor, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a scalar, by tokens and parameters; zeros where it does not depend on them."""
        wanted = x | {f"parameter {name}": p for name, p in self.parameters.items()}
        if not value.requires_grad:
            return {f"gradient of {name}": torch.zeros_like(t) for name, t in wanted.items()}
        found = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True, retain_graph=True)
        return {f"gradient of {name}": g for name, g in zip(wanted, found, strict=True)}


def gap(a: Tensor, b: Tensor) -> float:
    """The largest deviation of a from b, relative to the larger of 1 and b's values; infinite for NaN."""
    if a.shape != b.shape:
        raise BrokenError(f"values of shape {tuple(a.shape)} in place of {tuple(b.shape)}")
    if not a.numel():
        return 0.0
    size = float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1))
    return size if math.isfinite(size) else math.inf


def nothing(gradient: Tensor) -> float:
    """0 if a gradient that must not exist is exactly zero, else at least twice the tolerance."""
    size = float(gradient.abs().max()) if gradient.numel() else 0.0
    return 0.0 if size == 0 else max(size, 2 * TOLERANCE) if math.isfinite(size) else math.inf


def leaf_of(tokens: Tokens) -> Tokens:
    """The same tokens, their x a tensor to differentiate by."""
    return Tokens(tokens.x.clone().requires_grad_(), tokens.index)


def spread(tokens: Tokens, places: Tensor, length: int, garbage: float) -> Tokens:
    """The tokens put at `places` (B, T) among `length`, the rest padding that carries garbage."""
    B, _, X = tokens.x.shape
    sign = torch.where(torch.arange(length) % 2 == 0, garbage, -garbage).to(tokens.x)
    x = sign[None, :, None].expand(B, length, X).scatter(1, places[..., None].expand(-1, -1, X), tokens.x)
    return Tokens(x, torch.full((B, length), -1).scatter(1, places, tokens.index))


def gapped(draw: Draw, T: int, pads: int) -> dict[str, Tensor]:
    """Places for T tokens of three rows among T + pads."""
    own = torch.arange(T).expand(3, -1)
    scattered = [sorted(draw.plain.sample(range(T + pads), T)) for _ in range(3)]
    return {
        "in front": own + pads,
        "at the end": own,
        "in the middle": own + pads * (own >= T // 2),
        "in different places": own + pads * (own >= torch.tensor([[0], [T // 3], [T]])),
        "anywhere": torch.tensor(scattered),
    }
