"""The native engine's matrix products, in turns with PyTorch's, beside the time that memory alone takes."""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.bench.machine import read_bandwidth, torch_threads
from writehead.bench.measure import Timing, alternate
from writehead.native.formats import Packed, pack
from writehead.native.library import library
from writehead.native.structs import FORMATS, Matrix

SHAPES = ((1536, 576), (576, 1536), (4096, 4096))  # outputs and inputs: a small model's, a large one's
ROWS = (1, 4, 8, 16, 64)
WORKING_SET = 128 * 2**20  # bytes of different matrices, used in turn as a model's are; no cache holds them

Product = Callable[[Tensor, int], object]  # of x with matrix number i


class NoEngine(ValueError):
    """There is no native library; the message says why."""


@dataclass(frozen=True)
class Row:
    """One product of x (rows, k) with a matrix (n, k).

    Attributes:
        name: "native int8" and so on; "torch float32" and "torch int8" (`_int_mm`) to compare with.
        n, k, rows: the shape.
        weight_bytes: that the product reads.
        bandwidth: bytes per second that the machine reads at `WORKING_SET` bytes.
        timing: of one product.
    """

    name: str
    n: int
    k: int
    rows: int
    weight_bytes: int
    bandwidth: float
    timing: Timing

    @property
    def rate(self) -> float:
        """Operations per second; a multiply-add is two."""
        return 2 * self.rows * self.n * self.k / self.timing.median

    @property
    def share(self) -> float:
        """The time that reading the weights takes at least, as a part of the product's time."""
        return self.weight_bytes / self.bandwidth / self.timing.median

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        names = ("name", "n", "k", "rows", "weight_bytes", "bandwidth", "rate", "share")
        return {name: getattr(self, name) for name in names} | self.timing.to_dict()


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    *,
    threads: int,
    rounds: int = 5,
    working_set: int = WORKING_SET,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure every format at every shape and number of rows, all formats of a cell in turns.

    Args:
        shapes: outputs and inputs of the matrices.
        rows: numbers of rows of x.
        threads: of the engine and of PyTorch.
        rounds: samples of each product.
        working_set: bytes of matrices of each format that are used in turn.
        say: told what comes next.

    Raises:
        NoEngine: no native library was built or it does not suit this processor.
    """
    found = []
    with torch_threads(threads), team(threads) as (engine, helpers), torch.inference_mode():
        bandwidth = read_bandwidth(working_set, threads)
        for n, k in shapes:
            weight = torch.randn(n, k) / k**0.5
            products = {
                f"native {name}": _native(engine, helpers, weight, name, working_set) for name in FORMATS
            }
            products |= {
                "torch float32": _linear(weight, working_set),
                "torch int8": _int_mm(weight, working_set),
            }
            for count in rows:
                say(f"matrix {n} x {k}, {count} rows")
                x = torch.randn(count, k)
                cases = {name: _case(call, x, held) for name, (call, held, _) in products.items()}
                if count <= 16:
                    del cases["torch int8"]  # `_int_mm` needs more rows
                for name, timing in alternate(cases, rounds, min_seconds=0.02, max_rounds=rounds).items():
                    found.append(Row(name, n, k, count, products[name][2], bandwidth, timing))
    return found


@contextmanager
def team(threads: int) -> Iterator[tuple[ctypes.CDLL, int]]:
    """The native library and so many threads of it.

    Raises:
        NoEngine: there is none; the message says why.
    """
    engine, reason = library()
    if engine is None:
        raise NoEngine(reason)
    helpers = engine.wh_team_create(threads)
    if not helpers:
        raise MemoryError(f"{threads} threads cannot be started")
    try:
        yield engine, helpers
    finally:
        engine.wh_team_free(helpers)


def _case(product: Product, x: Tensor, held: int) -> Callable[[], float]:
    """Products with as many of the matrices as take a sensible time; seconds for each."""
    used = max(1, held // len(x))

    def run() -> float:
        start = time.perf_counter()
        for i in range(used):
            product(x, i)
        return (time.perf_counter() - start) / used

    return run


def _native(
    engine: ctypes.CDLL, helpers: int, weight: Tensor, format: str, working_set: int
) -> tuple[Product, int, int]:
    first = pack(weight, format)
    kept = [first] + [_copy(first) for _ in range(working_set // first.nbytes)]
    matrices = [Matrix.of(each) for each in kept]

    def product(x: Tensor, i: int) -> Tensor:
        y = torch.empty(len(x), first.n)
        done = engine.wh_linear(helpers, ctypes.byref(matrices[i]), x.data_ptr(), len(x), y.data_ptr())
        assert done == 0
        assert kept
        return y

    return product, len(kept), first.nbytes


def _copy(packed: Packed) -> Packed:
    scales = None if packed.scales is None else packed.scales.clone()
    return Packed(packed.format, packed.n, packed.k, packed.data.clone(), scales)


def _linear(weight: Tensor, working_set: int) -> tuple[Product, int, int]:
    kept = [weight.clone() for _ in range(working_set // weight.nbytes + 1)]
    return lambda x, i: F.linear(x, kept[i]), len(kept), weight.nbytes


def _int_mm(weight: Tensor, working_set: int) -> tuple[Product, int, int]:
    """Integers only: it neither quantises x nor scales the result, which the engine's products do."""
    first = (weight * 127 / weight.abs().max()).round().to(torch.int8)
    kept = [first.clone().t() for _ in range(working_set // first.nbytes + 1)]

    def product(x: Tensor, i: int) -> Tensor:
        return torch._int_mm(x.to(torch.int8), kept[i])

    return product, len(kept), first.nbytes
