"""How time and memory of attention grow with the length: forward, and forward with backward, one layer.

Every cell runs in a process of its own, since the most memory that a process ever held never falls again.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writehead.bench.plots import INK, _pyplot, _save
from writehead.catalog import MIXERS, build, find
from writehead.core.positions import Positions

WINDOW, BLOCK = 256, 64
KIB = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Subject:
    """A mixer whose arguments may follow the length, and the slope that theory gives its time."""

    spec: Callable[[int], Mapping[str, Any]]
    slope: float


def _root(tokens: int) -> int:
    """A power of two near the root."""
    return 1 << round(math.log2(tokens) / 2)


SUBJECTS: Mapping[str, Subject] = {
    "window": Subject(lambda T: {"name": "local_mha", "pattern": {"name": "window", "window": WINDOW}}, 1),
    "window, one write-head": Subject(
        lambda T: {"name": "local_mqa", "pattern": {"name": "window", "window": WINDOW}}, 1
    ),
    "sparse strided": Subject(lambda T: {"name": "sparse_strided", "stride": _root(T)}, 1.5),
    "sparse fixed": Subject(
        lambda T: {"name": "sparse_fixed", "stride": _root(T), "columns": max(1, _root(T) // 16)}, 1.5
    ),
    "longformer": Subject(lambda T: {"name": "longformer", "window": WINDOW, "tokens": BLOCK}, 1),
    "big bird": Subject(lambda T: {"name": "big_bird", "block": BLOCK}, 1),
    "image 1d": Subject(lambda T: {"name": "image_1d", "block": WINDOW, "memory": WINDOW}, 1),
    "image 2d": Subject(
        lambda T: {"name": "image_2d", "image_width": _root(T), "patch": [16, 16], "margin": [8, 8]}, 1
    ),
    "block bert, looking back": Subject(lambda T: {"name": "block_causal", "blocks": 3, "block": WINDOW}, 1),
    "axial": Subject(lambda T: {"name": "axial_causal", "image_width": _root(T)}, 1.5),
    "dense": Subject(lambda T: {"name": "mha"}, 2),
}


@dataclass(frozen=True)
class Growth:
    """One subject at one length.

    Attributes:
        name, tokens: what was measured.
        forward_s, both_s: least seconds of a forward call, and of one with its backward pass.
        peak_bytes: how far the process grew beyond what it held before the first call.
        error: why there are no figures.
    """

    name: str
    tokens: int
    forward_s: float = math.nan
    both_s: float = math.nan
    peak_bytes: int = 0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def measure(
    name: str, tokens: int, heads: int, head_dim: int, threads: int, rounds: int
) -> tuple[float, float, int]:
    """Seconds of forward, seconds of forward and backward, bytes; in the process that calls it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    spec = {**SUBJECTS[name].spec(tokens), "heads": heads}
    dim = heads * head_dim
    mixer = build(MIXERS, spec, dim=dim, position=None)
    encodes = find(MIXERS, spec).decodes == "encode"

    x = torch.randn(1, tokens, dim, requires_grad=True)

    def run() -> Tensor:
        pos = Positions.range(1, 0, tokens)
        y: Tensor = mixer.encode(x, pos)[0] if encodes else mixer(x, pos)[0]
        return y

    return clock(run, torch.randn(x.shape), rounds)


def clock(run: Callable[[], Tensor], weight: Tensor, rounds: int) -> tuple[float, float, int]:
    """Least seconds of a forward call, least of one with its backward pass from the gradient `weight`, and
    the bytes that the process grew by."""
    before = _highest(reset=True)
    forward, both = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        y = run()
        middle = time.perf_counter()
        y.backward(weight)
        forward.append(middle - start)
        both.append(time.perf_counter() - start)
        del y
    return min(forward), min(both), max(0, _highest() - before)


def alone(name: str, tokens: int, work: Callable[..., tuple[float, float, int]], *args: Any) -> Growth:
    """What `work(*args)` measures, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        task = pool.submit(work, *args)
        try:
            return Growth(name, tokens, *task.result())
        except (BrokenProcessPool, RuntimeError, MemoryError, ImportError) as problem:
            return Growth(name, tokens, error=f"{type(problem).__name__}: {problem}")


def _highest(reset: bool = False) -> int:
    """The most bytes that this process held, on Linux since the last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        if reset:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        lines = status.read_text().splitlines()
        found = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
        if found is not None:
            return int(found) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def scaling(
    names: Iterable[str],
    lengths: Sequence[int],
    *,
    heads: int = 8,
    head_dim: int = 64,
    threads: int = 1,
    rounds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> list[Growth]:
    """Measure each subject at each length.

    Args:
        names: of `SUBJECTS`.
        lengths: tokens T of the one row; "dense" is measured up to 16384 only.
        heads, head_dim: of the layer; its width is their product.
        threads: of torch.
        rounds: calls of each cell, of which the fastest counts.
        say: told what happens, before it happens.
    """
    found = []
    for name in names:
        for tokens in lengths:
            if name == "dense" and tokens > 1 << 14:
                continue
            say(f"{name}, {tokens} tokens")
            found.append(alone(name, tokens, measure, name, tokens, heads, head_dim, threads, rounds))
    return found


def slopes(cells: Sequence[Growth]) -> dict[str, dict[str, float]]:
    """For each subject the slopes of its curves in doubly logarithmic scales, and the one of theory."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(cell.name for cell in cells):
        own = [cell for cell in cells if cell.name == name and not cell.error]
        found[name] = {"theory": SUBJECTS[name].slope}
        for key in ("forward_s", "both_s", "peak_bytes"):
            points = [(math.log(c.tokens), math.log(getattr(c, key))) for c in own if getattr(c, key) > 0]
            found[name][key] = slope(points)
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line nearest to the points; not-a-number for fewer than two."""
    if len({x for x, _ in points}) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return float(sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)


def scaling_plot(cells: Sequence[Growth], path: Path) -> None:
    """Time of forward with backward, and memory, against the length."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    fitted = slopes(cells)
    for axis, key, unit, label in (
        (axes[0], "both_s", 1.0, "seconds, forward and backward"),
        (axes[1], "peak_bytes", 2.0**-20, "MiB beyond the weights and the input"),
    ):
        for place, name in enumerate(fitted):
            line = [
                (c.tokens, getattr(c, key) * unit) for c in cells if c.name == name and getattr(c, key) > 0
            ]
            style = "o-" if place < len(INK) else "s--"
            if line:
                axis.plot(*zip(*line, strict=True), style, color=INK[place % len(INK)], markersize=4,
                          label=f"{name}: slope {fitted[name][key]:.2f}")  # fmt: skip
        lengths = sorted({c.tokens for c in cells})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths], fontsize=8)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(top=axis.get_ylim()[1] * 3 ** (len(fitted) / 3))  # room for the names
        axis.legend(loc="upper left", fontsize=7, frameon=False)
    figure.tight_layout()
    _save(figure, path)
