"""Kill -9 at random moments, saves included: what is resumed is old or new, never mixed, and ends bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.train.small import assert_same, train, values, write
from writehead.train import checkpoint

KILLS = int(os.environ.get("WRITEHEAD_KILLS", "5"))  # 50 and more take a minute


def child(given: dict, out: Path) -> int:
    """A process that goes on with the run from where it is."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        train(given, out, resume="auto")
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    given = values(
        write(tmp_path),
        loop={"steps": 8},
        report={"save_every": 1, "eval_every": 0, "keep": 2, "sample": None},
    )
    given["optim"] = {"name": "adamw", "lr": 0.01}
    began = time.perf_counter()
    whole = train(given, tmp_path / "whole")
    usual = time.perf_counter() - began
    moments, out, ended, done, torn = random.Random(KILLS), tmp_path / "run0", 0, 0, 0
    while done < KILLS:
        pid = child(given, out)
        time.sleep(moments.uniform(0, usual * 0.6))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            done += 1
            torn += any(out.glob(".checkpoint-*"))
            found, problems = checkpoint.newest(out)
            assert problems == []
            assert len(checkpoint.found(out)) <= 3
            assert found is not None or not checkpoint.found(out)
            continue
        assert os.waitstatus_to_exitcode(status) == 0
        ended += 1
        assert_same(checkpoint.path_of(out, 8), whole)
        out = tmp_path / f"run{ended}"
    assert torn or KILLS < 50  # some of so many hit a save
    if not out.exists() or checkpoint.newest(out)[0] != checkpoint.path_of(out, 8):
        train(given, out, resume="auto")
    assert_same(checkpoint.path_of(out, 8), whole)
    assert not list(out.glob(".checkpoint-*"))
