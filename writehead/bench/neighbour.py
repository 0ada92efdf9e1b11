"""What a busy neighbour costs: decoding beside processes that keep cores busy, against decoding alone."""

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from writehead.bench.measure import Case, Timing, alternate


@dataclass(frozen=True)
class Beside:
    """One engine.

    Attributes:
        engine: what ran.
        alone, beside: seconds of a step without and with the busy processes.
    """

    engine: str
    alone: Timing
    beside: Timing

    @property
    def kept(self) -> float:
        """Share of its undisturbed speed."""
        return self.alone.median / self.beside.median

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self) | {"kept": self.kept}


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Keep so many cores busy while the body runs."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the engines' locks in any state
    workers = [context.Process(target=_spin, daemon=True) for _ in range(cores)]
    for worker in workers:
        worker.start()
    time.sleep(1.0)  # a fresh interpreter needs a moment before it spins
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def beside(cases: Mapping[str, Case], cores: int = 1, rounds: int = 5) -> list[Beside]:
    """Measure each case alone, then beside busy cores.

    Args:
        cases: decode steps that report their own seconds.
        cores: to keep busy.
        rounds: samples of each.
    """
    alone = alternate(cases, rounds, min_seconds=0.3, max_rounds=rounds)
    with busy(cores):
        disturbed = alternate(cases, rounds, min_seconds=0.3, max_rounds=rounds)
    return [Beside(name, alone[name], disturbed[name]) for name in cases]
