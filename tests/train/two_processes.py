"""Runs trained by two processes of `torchrun`, one after the other; this file is what each process does."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.train.small import train

ROOT = Path(__file__).parents[2]


def launch(jobs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Train each job ("run", "out", "resume") in two processes; their list is written to a folder."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.train.two_processes", str(path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(job["run"], Path(job["out"]), resume=job["resume"])
    dist.destroy_process_group()
