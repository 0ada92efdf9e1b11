"""One of two processes that train a reversible decoder on half a batch each: `parallel_worker.py KIND RANK FILE`.

Rank 0 prints the largest deviation of its gradients from those of one process with the whole batch.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from writehead.config import ModelConfig
from writehead.model.decoder import Decoder


def gradients(model: nn.Module, tokens: torch.Tensor, owner: nn.Module) -> dict[str, torch.Tensor]:
    logits, _ = model(tokens)
    logits.square().mean().backward()
    found = {name: p.grad for name, p in owner.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def main(kind: str, rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    config = ModelConfig(
        vocab=11, dim=16, depth=3, mixer=({"name": "mqa", "heads": 4}, {"name": "reformer", "heads": 4, "window": 4}),
        stack={"name": "reversible"}, feedforward={"name": "chunked", "chunk": 4, "hidden": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.randint(11, (4, 12))
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Decoder(config).double())
    right = gradients(models[0], tokens, models[0])
    mine = tokens[2 * rank : 2 * rank + 2]
    if kind == "ddp":
        found = gradients(DistributedDataParallel(models[1]), mine, models[1])
    else:
        fully_shard(models[1])
        found = gradients(models[1], mine, models[1])
    worst = max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in right.items())
    if rank == 0:
        print(worst)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
