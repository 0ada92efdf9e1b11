"""What each process of `torchrun` does for test_parallel.py: the runs of a JSON file, one after the other."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train.small import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(job["run"], Path(job["out"]), resume=job["resume"])
    dist.destroy_process_group()
