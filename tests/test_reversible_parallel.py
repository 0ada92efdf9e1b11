"""The reversible stack on several processes: DistributedDataParallel and FSDP2 over gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_have_the_gradients_of_one(kind, tmp_path):
    commands = [[sys.executable, str(WORKER), kind, str(rank), str(tmp_path / "meet")] for rank in (0, 1)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": WORKER.parents[1]}
    runs = [
        subprocess.Popen(command, env={"PYTHONPATH": str(WORKER.parents[1])}, **pipes) for command in commands
    ]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said[0][1] + said[1][1]
    assert float(said[0][0]) < 1e-9
