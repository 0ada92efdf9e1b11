"""Fair timing: competing callables take turns in one run; results are written with all that explains them."""

import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from writehead.bench.machine import machine
from writehead.bench.worker import CaseError
from writehead.core import system

Case = Callable[[], float | None]
Progress = Callable[[str, int, int], None]
FOREIGN_CORES = 0.12  # a sample is disturbed when others (see `Foreign`) use more than this
SHORTEST_WATCH = 0.1  # seconds; the kernel counts in ticks of 10 ms, so a shorter watch says nothing


@dataclass(frozen=True)
class Sample:
    """One turn of one case."""

    seconds: float
    foreign_cores: float | None  # cores that others used meanwhile, None where unknown


@dataclass(frozen=True)
class Timing:
    """Quartiles in seconds over the samples kept; a case that failed has no samples, NaN and its error."""

    median: float
    q1: float
    q3: float
    n: int
    samples: tuple[float, ...]
    dropped: int = 0  # disturbed samples left out
    disturbed: int = 0  # disturbed samples kept, since too few were undisturbed
    error: str = ""

    @classmethod
    def of(cls, samples: Sequence[Sample], keep: int = 3, error: str = "") -> Self:
        """Quartiles of the undisturbed samples, or of the `keep` least disturbed ones if there are fewer."""
        if error or not samples:
            return cls(math.nan, math.nan, math.nan, 0, (), error=error or "no samples")
        foreign = [sample.foreign_cores or 0.0 for sample in samples]
        limit = max(FOREIGN_CORES, sorted(foreign)[min(keep, len(samples)) - 1])
        kept = tuple(sample.seconds for sample, cores in zip(samples, foreign, strict=True) if cores <= limit)
        disturbed = sum(FOREIGN_CORES < cores <= limit for cores in foreign)
        q1, median, q3 = quartiles(kept)
        return cls(median, q1, q3, len(kept), kept, dropped=len(samples) - len(kept), disturbed=disturbed)

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON, in seconds."""
        return {
            "median_s": self.median,
            "q1_s": self.q1,
            "q3_s": self.q3,
            "n": self.n,
            "samples_s": list(self.samples),
            "dropped": self.dropped,
            "disturbed": self.disturbed,
            "error": self.error,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, interpolated between the values given."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


class Foreign:
    """A stopwatch over the processor time that goes to others than this process and its descendants.

    Others are processes, and on a virtual machine whoever its host prefers while there is work here.
    """

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float] | None:
        busy, own = system.busy_seconds(), system.own_seconds()
        return None if busy is None or own is None else (time.perf_counter(), busy - own)

    def cores(self) -> float | None:
        """Cores that others used on average since the start, None where the system does not say."""
        end = self._read()
        if self.start is None or end is None or end[0] - self.start[0] < SHORTEST_WATCH:
            return None
        return max(0.0, end[1] - self.start[1]) / (end[0] - self.start[0])


def turn(case: Case, min_seconds: float) -> Sample:
    """Call a case for at least `min_seconds` of wall time; seconds per call, its own figure if it has one."""
    foreign, start = Foreign(), time.perf_counter()
    reported: list[float] = []
    calls = 0
    while True:
        value = case()
        elapsed, calls = time.perf_counter() - start, calls + 1
        if value is not None:
            reported.append(value)
        if elapsed >= min_seconds:
            break
    if reported and len(reported) < calls:
        raise TypeError("a case must return seconds in every call or in none")
    return Sample(statistics.fmean(reported) if reported else elapsed / calls, foreign.cores())


def _warm(case: Case, warmup: int) -> str:
    try:
        for _ in range(warmup):
            case()
    except CaseError as problem:
        return str(problem)
    return ""


def alternate(
    cases: Mapping[str, Case],
    rounds: int = 5,
    warmup: int = 1,
    min_seconds: float = 0.3,
    *,
    max_rounds: int | None = None,
    budget_s: float = math.inf,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Measure competing callables in turns, so that drift of the machine meets all alike.

    Each round has an order of its own, since a case feels what ran before it: PyTorch's threads, for one, go
    on looking for work for some 10 ms.

    Args:
        cases: callables by name; one that returns a float reports its own seconds, else the call is timed.
        rounds: undisturbed samples wanted of each case.
        warmup: untimed calls of each case before the first round.
        min_seconds: wall time of one sample, within which a case is called again and again.
        max_rounds: rounds at most, when some are disturbed by other processes; None is twice `rounds`.
        budget_s: seconds after which no further round begins, once there are two.
        progress: called before every turn with the name, the round from 0 and the rounds planned.

    Returns:
        Timing by name, in the order given. A case that raises CaseError has its message there instead.

    Raises:
        ValueError: no case, `rounds` below 1, `warmup` below 0, `max_rounds` below `rounds`.
    """
    if not cases:
        raise ValueError("cases is empty; give at least one callable")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds} must be at least 1 and warmup={warmup} at least 0")
    limit = 2 * rounds if max_rounds is None else max_rounds
    if limit < rounds:
        raise ValueError(f"max_rounds={max_rounds} must be at least rounds={rounds}")
    errors = {name: error for name, case in cases.items() if (error := _warm(case, warmup))}
    samples: dict[str, list[Sample]] = {name: [] for name in cases}

    def clean(name: str) -> int:
        return sum((sample.foreign_cores or 0.0) <= FOREIGN_CORES for sample in samples[name])

    began = time.perf_counter()
    for index in range(limit):
        if index >= 2 and time.perf_counter() - began > budget_s:
            break
        running = [name for name in cases if name not in errors]
        if index >= rounds and all(clean(name) >= rounds for name in running):
            break
        for name in random.Random(index).sample(running, len(running)):
            if progress is not None:
                progress(name, index, max(rounds, index + 1))
            try:
                samples[name].append(turn(cases[name], min_seconds))
            except CaseError as problem:
                errors[name] = str(problem)
    return {name: Timing.of(samples[name], min(3, rounds), errors.get(name, "")) for name in cases}


def jsonable(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON has no words for, and dataclasses as objects."""
    if hasattr(value, "to_dict"):
        return jsonable(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_record(
    path: Path, kind: str, results: object, extra: Mapping[str, Any] | None = None, *, seed: int | None = None
) -> None:
    """Write a result file: what was measured, on which machine, from which commit, with which versions.

    Args:
        path: JSON file, written whole or not at all; missing folders are made.
        kind: name of the measurement, for instance "decode".
        results: mappings, lists, numbers, text, and objects with `to_dict`.
        extra: further facts of the run (model, peers' versions, arguments).
        seed: of the random generators, None if the run draws nothing.
    """
    record = {
        "kind": kind,
        "seed": seed,
        "machine": machine(),
        "extra": dict(extra or {}),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(jsonable(record), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
