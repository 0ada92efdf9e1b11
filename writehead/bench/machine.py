"""What this machine is and what it can do at most: its description, its memory, its roofs.

A roof is a limit, and anything that disturbs a measurement only lowers it, so the fastest repetition counts.
"""

import functools
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import writehead
from writehead.core import system
from writehead.core.system import available_memory
from writehead.version import VERSION

WORKING_SETS = tuple(2**20 * size for size in (16, 64, 128, 256, 512, 1024))
MATRIX_ROWS = (1, 16, 64)  # beside the square product, which is the limit
SQUARE = {  # the others are up to thirty times slower where they are emulated
    torch.float32: 2048,
    torch.bfloat16: 1024,
    torch.int8: 1024,
}


@dataclass(frozen=True)
class Roofs:
    """The limits of a machine: what it reads and what it multiplies at most.

    `bandwidth` maps a working set in bytes to bytes per second. `matmul` maps the name of a type to
    {rows M: FLOP per second}; the largest M is the limit, the others say what a thin product reaches.
    """

    bandwidth: Mapping[int, float]
    matmul: Mapping[str, Mapping[int, float]]
    threads: int

    @classmethod
    def given(cls, bandwidth: float, rate: float, threads: int = 1) -> "Roofs":
        """Roofs from one bandwidth (bytes/s) and one rate (FLOP/s) instead of a measurement."""
        if not (bandwidth > 0 and rate > 0):
            raise ValueError(f"bandwidth={bandwidth} and rate={rate} must both be above 0")
        return cls({WORKING_SETS[-1]: bandwidth}, {"float32": {SQUARE[torch.float32]: rate}}, threads)

    def bandwidth_at(self, working_set: int) -> float:
        """Bytes per second at `working_set` bytes: linear between measured sizes, constant outside them."""
        sizes = sorted(self.bandwidth)
        if working_set <= sizes[0]:
            return self.bandwidth[sizes[0]]
        for low, high in itertools.pairwise(sizes):
            if working_set <= high:
                share = (working_set - low) / (high - low)
                return self.bandwidth[low] * (1 - share) + self.bandwidth[high] * share
        return self.bandwidth[sizes[-1]]

    def rate(self, dtype: str = "float32") -> float:
        """FLOP per second of the large square product in `dtype`.

        Raises:
            ValueError: a type that was not measured.
        """
        if dtype not in self.matmul:
            raise ValueError(f"dtype={dtype!r} was not measured; measured: {', '.join(self.matmul)}")
        return self.matmul[dtype][max(self.matmul[dtype])]

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON: sizes in bytes as text, bytes/s and FLOP/s as numbers."""
        return {
            "bandwidth_bytes_per_s": {str(size): rate for size, rate in self.bandwidth.items()},
            "matmul_flops": {
                name: {str(M): rate for M, rate in rates.items()} for name, rates in self.matmul.items()
            },
            "threads": self.threads,
        }


def roofline_seconds(
    bytes_moved: float, flops: float, roofs: Roofs, working_set: int, *, dtype: str = "float32"
) -> float:
    """The least time a step can take: the larger of bytes over bandwidth and FLOPs over rate.

    Args:
        bytes_moved: bytes that one step must read and write.
        flops: floating-point operations of one step (a multiply-add is two).
        roofs: the machine's limits.
        working_set: bytes that the step cycles through, which decide the cache level it reads from.
        dtype: the type the products run in.

    Returns:
        Seconds.
    """
    return max(bytes_moved / roofs.bandwidth_at(working_set), flops / roofs.rate(dtype))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run the body with `threads` torch threads, then restore the former number."""
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(call: Callable[[], object], seconds: float, repetitions: int = 3) -> float:
    """Seconds of the fastest call, after one warm-up, over `seconds` and at least `repetitions` calls."""
    call()
    best, n, start = float("inf"), 0, time.perf_counter()
    while n < repetitions or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        best, n = min(best, time.perf_counter() - before), n + 1
    return best


def readers(x: torch.Tensor) -> list[Callable[[], object]]:
    """The torch operations that come nearest to the limit; which one does depends on the cache level."""
    matrix = x.view(-1, 1024)
    vector = torch.ones(1024)
    return [x.sum, lambda: torch.mv(matrix, vector)]


def read_bandwidth(working_set_bytes: int, threads: int, *, buffer: torch.Tensor | None = None) -> float:
    """Measure how fast torch reads `working_set_bytes` over and over.

    Args:
        working_set_bytes: bytes read in each pass, at least 4096.
        threads: torch threads.
        buffer: float32 memory to read from, written before; None allocates.

    Returns:
        Bytes per second of the fastest pass.

    Raises:
        ValueError: a working set below 4096 bytes or above the buffer.
    """
    n = working_set_bytes // 4096 * 1024
    if n < 1024:
        raise ValueError(f"working_set_bytes={working_set_bytes} must be at least 4096")
    if buffer is None:
        buffer = torch.ones(n)  # written, since untouched pages all map to one page of zeros
    if n > buffer.numel():
        held = buffer.numel() * buffer.element_size()
        raise ValueError(f"working_set_bytes={working_set_bytes} is above the buffer's {held}")
    with torch_threads(threads), torch.inference_mode():
        return 4 * n / min(fastest(call, 0.06) for call in readers(buffer[:n]))


def matmul_rate(dtype: torch.dtype, M: int, threads: int) -> float:
    """Measure the product of M rows with a square matrix.

    Args:
        dtype: type of both factors.
        M: rows; at 1024 and above the matrix has M rows too, so the whole product is square.
        threads: torch threads.

    Returns:
        FLOP per second of the fastest product.
    """
    if M < 1:
        raise ValueError(f"M={M} must be at least 1")
    with torch_threads(threads), torch.inference_mode():
        multiply, operations = product(dtype, M)
        return operations / fastest(multiply, 0.04)


@functools.cache
def fastest_type(dtypes: tuple[str, ...], threads: int) -> str:
    """The one of some types whose square products of 1024 rows are fastest."""
    return max(dtypes, key=lambda dtype: matmul_rate(getattr(torch, dtype), 1024, threads))


def product(dtype: torch.dtype, M: int) -> tuple[Callable[[], object], int]:
    """M rows times a square matrix, of M rows too from 1024 on, and its operations."""
    K = max(M, 1024)  # 1024 keeps the matrix in cache, so a thin product is not a bandwidth test
    x, w = torch.ones(M, K, dtype=dtype), torch.ones(K, K, dtype=dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return lambda: multiply(x, w.t()), 2 * M * K * K


@functools.cache
def roofs(threads: int | None = None, largest: int = WORKING_SETS[-1]) -> Roofs:
    """Measure this machine's roofs, about three seconds; later calls in the process return the same value.

    Args:
        threads: torch threads; None takes torch's present number.
        largest: bytes of the largest working set; sets that would not fit in half the memory are left out.

    Returns:
        Bandwidth by working set and matrix rates in float32, bfloat16 and int8.

    Raises:
        ValueError: `largest` below the smallest working set.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if largest < WORKING_SETS[0]:
        raise ValueError(f"largest={largest} bytes must be at least {WORKING_SETS[0]}")
    free = available_memory()
    limit = largest if free is None else min(largest, max(free // 2, WORKING_SETS[0]))
    sizes = [size for size in WORKING_SETS if size <= limit]
    buffer = torch.ones(sizes[-1] // 4)
    bandwidth = {size: read_bandwidth(size, threads, buffer=buffer) for size in sizes}
    matmul = {
        str(dtype).removeprefix("torch."): {M: matmul_rate(dtype, M, threads) for M in (*MATRIX_ROWS, square)}
        for dtype, square in SQUARE.items()
    }
    return Roofs(bandwidth, matmul, threads)


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the source tree at `root`, and whether its package differs from it; None where unknown."""
    if not (root / ".git").exists():
        return None, None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", "writehead"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if head.returncode or status.returncode:
        return None, None
    return head.stdout.strip(), bool(status.stdout.strip())


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the source tree, in a form for JSON; None where unknown."""
    commit, dirty = git_state(Path(writehead.__file__).resolve().parents[1])
    return {
        "cpu": system.cpu_model(),
        "cores": system.cores(),
        "caches": system.caches(),
        "memory_bytes": system.total_memory(),
        "available_memory_bytes": available_memory(),
        "instruction_sets": system.instruction_sets(),
        "platform": platform.platform(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "thread_environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "MKL_", "THP_"))
        },
        "versions": {"writehead": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
