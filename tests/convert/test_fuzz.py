"""Ten thousand spoiled files: each loads or is refused with BadFile, in memory bounded by its size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import writehead

SCRIPT = Path(__file__).with_name("fuzz_files.py")
CASES = {"gguf": 4500, "safetensors": 2500, "index": 2000, "tokenizer": 1000}


def test_the_cases_are_ten_thousand():
    assert sum(CASES.values()) == 10_000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
@pytest.mark.parametrize("kind", CASES)
def test_spoiled_files_load_or_are_refused_and_nothing_else(kind):
    root = str(Path(writehead.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, kind, "2026", str(CASES[kind])],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["count"] == summary["loaded"] + summary["refused"] == CASES[kind]
    assert min(summary["loaded"], summary["refused"]) > CASES[kind] // 100
    assert summary["reasons"] >= 10
    assert summary["longest"] < 500
