"""The machine's limits as cases of a measurement."""

import time

import pytest

from writehead.bench import limits
from writehead.bench.limits import Limits
from writehead.bench.measure import Timing

PAGE = 4096


def taking(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, 1, (seconds,))


@pytest.mark.parametrize("fast", ["float32", "int8"])
def test_the_fastest_way_of_reading_and_of_multiplying_is_the_limit(
    fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "fastest_type", lambda dtypes, threads: fast)
    found = Limits(10 * PAGE + 5, ("float32", "int8"))
    took = dict.fromkeys(found.cases, taking(1.0))
    roofs = found.roofs(took | {"read 1": taking(5e-10), f"{fast} product of 64 rows": taking(1e-10)})
    assert roofs.bandwidth_at(10 * PAGE) == pytest.approx(2e9)
    assert roofs.rate(fast) == pytest.approx(1e10)
    with pytest.raises(ValueError, match=f"'bfloat16' was not measured; measured: {fast}"):
        roofs.rate("bfloat16")


def test_a_case_gives_seconds_for_each_byte_or_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 7.0, 9.0, 12.0, 99.0])
    monkeypatch.setattr(limits, "SAMPLE", 10)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert limits._each(lambda: None, 10)() == pytest.approx(3 / 10)
    assert next(clock) == 99


def test_no_more_is_read_than_the_largest_working_set_or_a_quarter_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "WORKING_SETS", (PAGE, 16 * PAGE))
    assert list(Limits(10**12).roofs(dict.fromkeys(Limits(10**12).cases, taking(1.0))).bandwidth) == [
        16 * PAGE
    ]
    monkeypatch.setattr(limits, "available_memory", lambda: 20 * PAGE)
    assert list(Limits(10**12).roofs(dict.fromkeys(Limits(10**12).cases, taking(1.0))).bandwidth) == [
        5 * PAGE
    ]
