"""One token's attention in the native engine, beside the least time that this machine needs for it."""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from writehead.bench.kernels import team
from writehead.bench.limits import Limits
from writehead.bench.machine import torch_threads
from writehead.bench.measure import Timing, alternate
from writehead.native.structs import FORMATS, Cache, pointer

HEADS, HEAD_DIM = 16, 64
KV_HEADS = (1, 4, 16)
CONTEXTS = (2048, 8192, 32768)
BATCHES = (1, 8)
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
WORKING_SET = 128 * 2**20  # bytes of layers that are read in turn, as a model's are; no cache holds them
SAMPLE = 0.1  # seconds of a turn
LARGEST = 300 * 2**20  # bytes of a single layer, above which a cell is left out
TOGETHER = 16  # layers of a call, as a model's step takes all of its own: Python's share is not attention


@dataclass(frozen=True)
class Row:
    """Attention of one token a row of the batch.

    Attributes:
        stored: format of keys and values.
        kv_heads, context, batch: the shape; there are 16 query heads of 64.
        read_bytes: keys, values and their scales.
        bandwidth: bytes per second that the machine reads at the working set, meanwhile.
        peak: operations per second of a large float32 product, meanwhile.
        timing: of one layer.
    """

    stored: str
    kv_heads: int
    context: int
    batch: int
    read_bytes: int
    bandwidth: float
    peak: float
    timing: Timing

    @property
    def operations(self) -> int:
        """Of scores and sums of values; a multiply-add is two."""
        return 4 * self.batch * HEADS * HEAD_DIM * self.context

    @property
    def roof_s(self) -> float:
        """The larger of bytes over bandwidth and operations over rate."""
        return max(self.read_bytes / self.bandwidth, self.operations / self.peak)

    @property
    def share(self) -> float:
        """Of the roofline's speed."""
        return self.roof_s / self.timing.median

    @property
    def bound(self) -> str:
        """Which of the two the roofline is."""
        return "memory" if self.read_bytes / self.bandwidth >= self.operations / self.peak else "sums"

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        names = (
            "stored",
            "kv_heads",
            "context",
            "batch",
            "read_bytes",
            "bandwidth",
            "peak",
            "roof_s",
            "share",
        )
        return {name: getattr(self, name) for name in (*names, "bound")} | self.timing.to_dict()


def measure(
    *,
    threads: int,
    rounds: int = 5,
    kv_heads: Sequence[int] = KV_HEADS,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    working_set: int = WORKING_SET,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure every format at every shape, in turns with the machine's limits; no layers above `LARGEST`.

    Args:
        threads: of the engine.
        rounds: samples of each cell.
        kv_heads: key/value heads that 16 query heads share.
        contexts: keys, multiples of 16.
        batches: rows.
        working_set: bytes of layers that are used in turn.
        say: told what comes next.

    Raises:
        NoEngine: no native library was built or it does not suit this processor.
    """
    found = []
    with torch_threads(threads), team(threads) as (engine, helpers), torch.inference_mode():
        limits = Limits(working_set)
        for shape in ((G, S, B) for G in kv_heads for S in contexts for B in batches):
            say("one token, {} key/value heads, context {}, batch {}".format(*shape))
            layers = {
                name: _Layers(name, *shape, working_set) for name in STORED if _bytes(name, *shape) <= LARGEST
            }
            cases = {name: held.case(engine, helpers) for name, held in layers.items()}
            if not cases:
                continue
            timings = alternate({**limits.cases, **cases}, rounds, min_seconds=0)
            here = limits.roofs(timings)
            bandwidth, peak = here.bandwidth_at(working_set), here.rate()
            for name in cases:
                found.append(Row(name, *shape, _bytes(name, *shape), bandwidth, peak, timings[name]))
    return found


def _bytes(stored: str, kv_heads: int, context: int, batch: int) -> int:
    """Of one layer."""
    scales = 8 if stored == "int8" else 0
    return batch * kv_heads * context * (2 * HEAD_DIM * STORED[stored].itemsize + scales)


class _Layers:
    """A full cache of as many layers as the working set takes, and queries."""

    def __init__(self, stored: str, kv_heads: int, context: int, batch: int, working_set: int) -> None:
        self.batch, self.next = batch, 0
        self.layers = -(-working_set // _bytes(stored, kv_heads, context, batch))
        slots = (batch, self.layers, kv_heads, context)
        self.k, self.v = (_numbers((*slots, HEAD_DIM), stored) for _ in range(2))
        scales = [torch.full(slots, 0.02) if stored == "int8" else None for _ in range(2)]
        self.pos = torch.arange(context, dtype=torch.int32).repeat(batch, 1)
        self.at = torch.full((batch, 1), context - 1, dtype=torch.int32)
        self.q = torch.randn(batch, 1, HEADS, HEAD_DIM)
        self.y = torch.empty(min(self.layers, TOGETHER), *self.q.shape)
        self.scales = scales
        held = [pointer(each) for each in (self.k, self.v, *scales, self.pos)]
        self.cache = Cache(
            FORMATS.index(stored), self.layers, HEADS, kv_heads, HEAD_DIM, context, 0, 0, *held
        )

    def case(self, engine: ctypes.CDLL, helpers: int) -> Callable[[], float]:
        """Attention over the layers in turn, for about a sample's time; seconds for each."""

        def run() -> float:
            start, layers = time.perf_counter(), 0
            while layers == 0 or time.perf_counter() - start < SAMPLE:
                layers += self._attend(engine, helpers)
            return (time.perf_counter() - start) / layers

        return run

    def _attend(self, engine: ctypes.CDLL, helpers: int) -> int:
        """Attention over the next layers: how many."""
        count = min(len(self.y), self.layers - self.next)
        done = engine.wh_attend(
            helpers, ctypes.byref(self.cache), self.next, count, self.batch, 1,
            pointer(self.q), pointer(self.at), HEAD_DIM**-0.5, 0, 0, None, pointer(self.y),
        )  # fmt: skip
        assert done == 0
        self.next = (self.next + count) % self.layers
        return count


def _numbers(shape: tuple[int, ...], stored: str) -> Tensor:
    """Normal numbers, which repeat: to draw them all would take longer than to measure."""
    few = torch.randn(2**16)
    if stored == "int8":
        few = (few * 30).round().clamp(-127, 127)
    some = few.to(STORED[stored])
    count = int(torch.tensor(shape).prod())
    return some.repeat(-(-count // len(some)))[:count].view(shape)
