"""A machine's limits as cases that take turns with what they bound: neighbours change them by the minute."""

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch

from writehead.bench.machine import WORKING_SETS, Roofs, fastest_type, product, readers
from writehead.bench.measure import Case, Timing
from writehead.core.system import available_memory

SAMPLE = 0.2  # seconds of a turn
PRODUCTS = (64, 1024)  # rows; the fastest counts


class Limits:
    """What the machine reads and multiplies meanwhile.

    Attributes:
        cases: for `measure.alternate`; seconds a byte and seconds an operation.
    """

    def __init__(self, working_set: int, dtypes: tuple[str, ...] = ("float32",)) -> None:
        """Take the memory that is to be read.

        Args:
            working_set: bytes that are read over and over, at most those of the largest in `WORKING_SETS`
                and a quarter of the memory that is free.
            dtypes: types that products may have; the fastest is measured.
        """
        most = min(working_set, WORKING_SETS[-1], (available_memory() or WORKING_SETS[-1] * 4) // 4)
        self._bytes = max(most // 4096, 1) * 4096
        buffer = torch.ones(self._bytes // 4)  # written, since untouched pages all map to one page of zeros
        self._reads = {f"read {i}": _each(call, self._bytes) for i, call in enumerate(readers(buffer))}
        self._dtype = dtypes[0] if len(dtypes) == 1 else fastest_type(dtypes, torch.get_num_threads())
        self._products = dict(_product(self._dtype, rows) for rows in PRODUCTS)
        self.cases: dict[str, Case] = self._reads | self._products

    def roofs(self, timings: Mapping[str, Timing]) -> Roofs:
        """The limits by what their cases took; medians, as of what they bound."""
        bandwidth = 1 / min(timings[name].median for name in self._reads)
        rate = 1 / min(timings[name].median for name in self._products)
        rates = {self._dtype: {max(PRODUCTS): rate}}
        return Roofs({self._bytes: bandwidth}, rates, torch.get_num_threads())


def _product(dtype: str, rows: int) -> tuple[str, Case]:
    multiply, operations = product(getattr(torch, dtype), rows)
    return f"{dtype} product of {rows} rows", _each(multiply, operations)


def _each(call: Callable[[], object], amount: int) -> Case:
    """The seconds of a call for each of the `amount` that it does: the median of those of a turn.

    The first ones share the machine with what the case before leaves behind, as threads that look for work.
    """

    def run() -> float:
        times = [time.perf_counter()]
        while len(times) == 1 or times[-1] - times[0] < SAMPLE:
            call()
            times.append(time.perf_counter())
        return statistics.median(end - start for start, end in pairwise(times)) / amount

    return run
