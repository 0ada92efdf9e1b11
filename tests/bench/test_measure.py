"""Turns, quartiles, disturbance, records and workers."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from writehead.bench import measure
from writehead.bench.measure import CaseError, Sample, Timing, alternate, quartiles, turn, write_record
from writehead.bench.worker import Worker
from writehead.core import system


class Clock:
    """A clock that moves only when told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def case(self, seconds):
        def run():
            self.now += seconds

        return run


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(measure.Foreign, "cores", lambda self: 0.0)


def test_cases_take_turns_after_their_warmup_in_orders_that_differ(quiet):
    order = []
    cases = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    alternate(cases, rounds=12, warmup=2, min_seconds=0)
    assert "".join(order[:6]) == "AABBCC"
    rounds = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"ABC"}
    assert {each[i : i + 2] for each in rounds for i in (0, 1)} == {"AB", "AC", "BA", "BC", "CA", "CB"}
    assert len(rounds) == 12


def test_a_case_reports_its_own_seconds(quiet):
    figures = iter([9.0, 1.0, 4.0, 2.0])
    timing = alternate({"a": lambda: next(figures)}, rounds=3, warmup=1, min_seconds=0)["a"]
    assert (timing.median, timing.q1, timing.q3, timing.n) == (2.0, 1.5, 3.0, 3)
    assert timing.samples == (1.0, 4.0, 2.0)


def test_a_case_without_a_figure_is_timed_per_call(monkeypatch, quiet):
    clock = Clock(monkeypatch)
    timings = alternate({"slow": clock.case(0.5), "fast": clock.case(0.1)}, rounds=2, min_seconds=1.0)
    assert timings["slow"].samples == pytest.approx((0.5, 0.5))
    assert timings["fast"].samples == pytest.approx((0.1, 0.1))


def test_a_turn_repeats_its_case_until_the_least_time_has_passed(monkeypatch, quiet):
    clock, calls = Clock(monkeypatch), []
    case = clock.case(0.3)
    turn(lambda: calls.append(case()), min_seconds=1.0)
    assert len(calls) == 4


def test_a_turn_averages_the_figures_of_its_calls(monkeypatch, quiet):
    clock, figures = Clock(monkeypatch), iter([1.0, 3.0])
    tick = clock.case(0.5)
    assert turn(lambda: tick() or next(figures), min_seconds=1.0).seconds == 2.0


def test_a_case_that_reports_only_sometimes_is_refused(monkeypatch, quiet):
    clock, figures = Clock(monkeypatch), iter([1.0, None])
    tick = clock.case(0.5)
    with pytest.raises(TypeError, match="in every call or in none"):
        turn(lambda: tick() or next(figures), min_seconds=1.0)


def test_progress_is_told_before_every_turn(quiet):
    seen = []
    alternate(
        {"a": lambda: 1.0, "b": lambda: 1.0},
        rounds=2,
        min_seconds=0,
        progress=lambda *step: seen.append(step),
    )
    assert sorted(seen) == [("a", 0, 2), ("a", 1, 2), ("b", 0, 2), ("b", 1, 2)]
    assert [index for _, index, _ in seen] == [0, 0, 1, 1]


def test_a_failing_case_becomes_a_row_and_the_others_go_on(quiet):
    calls = []

    def crashes():
        calls.append(None)
        if len(calls) == 3:
            raise CaseError("peer: ended with code -9")
        return 1.0

    def never():
        raise CaseError("peer: not enough memory")

    timings = alternate({"a": crashes, "b": lambda: 2.0, "c": never}, rounds=4, min_seconds=0)
    assert timings["a"].error == "peer: ended with code -9"
    assert timings["a"].n == 0
    assert math.isnan(timings["a"].median)
    assert timings["c"].error == "peer: not enough memory"
    assert (timings["b"].median, timings["b"].n, timings["b"].error) == (2.0, 4, "")


def test_a_bug_in_a_case_is_not_swallowed(quiet):
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda: 1 / 0}, min_seconds=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": {}}, "cases is empty"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"warmup": -1}, "warmup=-1 at least 0"),
        ({"rounds": 5, "max_rounds": 4}, "max_rounds=4 must be at least rounds=5"),
    ],
)
def test_impossible_rounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        alternate(**{"cases": {"a": lambda: 1.0}, **arguments})


def test_disturbed_samples_are_dropped_and_counted():
    samples = [Sample(1.0, 0.0), Sample(9.0, 0.5), Sample(2.0, 0.1), Sample(3.0, None)]
    timing = Timing.of(samples)
    assert (timing.samples, timing.dropped, timing.disturbed) == ((1.0, 2.0, 3.0), 1, 0)


def test_the_least_disturbed_samples_stay_when_none_is_undisturbed():
    samples = [Sample(1.0, 0.9), Sample(2.0, 0.2), Sample(3.0, 0.4), Sample(4.0, 0.3)]
    timing = Timing.of(samples, keep=3)
    assert (timing.samples, timing.dropped, timing.disturbed) == ((2.0, 3.0, 4.0), 1, 3)


def test_disturbed_rounds_are_made_up_for_until_the_limit(monkeypatch):
    foreign = iter([0.0, 1.0, 1.0, 0.0, 0.0] + [0.0] * 9)
    monkeypatch.setattr(measure.Foreign, "cores", lambda self: next(foreign))
    figures = iter(range(1, 99))
    timing = alternate({"a": lambda: float(next(figures))}, rounds=3, warmup=0, min_seconds=0)["a"]
    assert (timing.samples, timing.dropped) == ((1.0, 4.0, 5.0), 2)
    monkeypatch.setattr(measure.Foreign, "cores", lambda self: 1.0)
    timing = alternate({"a": lambda: 1.0}, rounds=2, warmup=0, min_seconds=0, max_rounds=3)["a"]
    assert (timing.n, timing.dropped, timing.disturbed) == (3, 0, 3)


@settings(derandomize=True, max_examples=25)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12))
def test_quartiles_are_the_interpolated_ones(values):
    assert quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def burn(seconds):
    code = f"import time\nwhile time.process_time() < {seconds}: pass\nprint('done', flush=True); input()"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.skipif(system.own_seconds() is None, reason="the system does not tell processor time")
def test_the_time_of_a_child_is_ours_and_not_foreign():
    own, busy = system.own_seconds(), system.busy_seconds()
    child = burn(0.3)
    child.stdout.readline()
    alive = system.own_seconds()
    child.communicate(b"\n")
    assert alive - own > 0.25
    assert system.own_seconds() >= alive - 0.05
    assert system.busy_seconds() - busy > 0.25


@pytest.mark.skipif(system.busy_seconds() is None, reason="the system does not tell processor time")
def test_time_that_is_not_ours_is_foreign(monkeypatch):
    clock = Clock(monkeypatch)
    readings = {"busy": 50.0, "own": 20.0}
    monkeypatch.setattr(system, "busy_seconds", lambda: readings["busy"])
    monkeypatch.setattr(system, "own_seconds", lambda: readings["own"])
    foreign = measure.Foreign()
    clock.now, readings["busy"], readings["own"] = clock.now + 2.0, 53.0, 22.0
    assert foreign.cores() == 0.5
    readings["own"] = 24.0
    assert foreign.cores() == 0.0
    clock.now += 2.0
    assert measure.Foreign().cores() is None, "an interval below a few ticks says nothing"


def test_a_record_says_what_ran_where_and_from_what(tmp_path):
    path = tmp_path / "deep" / "decode.json"
    results = {"a": Timing.of([Sample(0.5, None)]), "b": Timing.of([], error="no such peer")}
    write_record(path, "decode", results, {"model": "smollm2"}, seed=7)
    record = json.loads(path.read_text())
    assert (record["kind"], record["seed"], record["extra"]) == ("decode", 7, {"model": "smollm2"})
    assert record["machine"]["versions"].keys() == {"writehead", "torch", "python"}
    assert record["results"]["a"]["median_s"] == 0.5
    assert record["results"]["b"]["median_s"] is None
    assert record["results"]["b"]["error"] == "no such peer"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "decode.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_record(path, "decode", {"a": object()})
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["decode.json"]


PEER = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    op, args = request["op"], request["args"]
    if op == "quit": sys.exit(0)
    if op == "crash": print("it burns", file=sys.stderr); sys.exit(3)
    if op == "hang": time.sleep(60)
    if op == "babble": print("hello"); sys.stdout.flush(); continue
    if op == "refuse": print(json.dumps({"error": "ValueError: too large"})); sys.stdout.flush(); continue
    print(json.dumps({"ok": args})); sys.stdout.flush()
"""


@pytest.fixture
def worker():
    with Worker("peer", [sys.executable, "-c", PEER]) as started:
        yield started


def test_a_worker_answers_and_keeps_its_process(worker):
    assert worker.call("echo", ids=[1, 2]) == {"ids": [1, 2]}
    with pytest.raises(CaseError, match="peer: refuse: ValueError: too large"):
        worker.call("refuse")
    assert worker.call("echo", n=3) == {"n": 3}, "a refused request does not end the worker"


def test_a_crashed_worker_says_where_and_its_last_words(worker):
    with pytest.raises(CaseError, match=r"peer: ended with code 3 in crash: it burns"):
        worker.call("crash")
    with pytest.raises(CaseError, match=r"ended with code 3 in echo"):
        worker.call("echo")


def test_a_worker_that_hangs_is_ended(worker):
    with pytest.raises(CaseError, match=r"peer: hang took longer than 0\.2 s and was ended"):
        worker.call("hang", timeout_s=0.2)
    with pytest.raises(CaseError, match="ended with code"):
        worker.call("echo")


def test_a_worker_that_does_not_speak_json_is_ended(worker):
    with pytest.raises(CaseError, match="babble answered 'hello', not JSON"):
        worker.call("babble")


def test_a_worker_that_cannot_start_says_so():
    with pytest.raises(CaseError, match="peer: cannot start /no/such/python: No such file"):
        Worker("peer", ["/no/such/python"])


def test_closing_a_worker_twice_ends_it_once():
    worker = Worker("peer", [sys.executable, "-c", PEER])
    worker.call("echo")
    worker.close()
    worker.close()
    assert worker._process.returncode == 0
    with pytest.raises(CaseError, match="ended with code 0"):
        worker.call("echo")


def test_closing_ends_a_worker_that_ignores_quit():
    stubborn = "import time\nprint('up', flush=True)\nwhile True: time.sleep(60)"
    worker = Worker("peer", [sys.executable, "-c", stubborn])
    worker.close(timeout_s=0.1)
    assert worker._process.returncode < 0
