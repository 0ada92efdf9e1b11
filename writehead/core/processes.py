"""What layers that keep averages in training need of the other processes that train the same model."""

import torch
import torch.distributed as dist
from torch import Tensor


def summed(t: Tensor) -> Tensor:
    """The sum of every process's tensor of one shape."""
    total = t.clone()
    dist.all_reduce(total)
    return total


def rows_of_all(rows: Tensor) -> Tensor:
    """Every process's rows (n, ...), n its own, one process after the other."""
    world = dist.get_world_size()
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(world)]
    dist.all_gather(counts, own)
    most = max(int(n) for n in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    found = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(found, padded)
    return torch.cat([part[: int(n)] for part, n in zip(found, counts, strict=True)])
