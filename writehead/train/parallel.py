"""Several processes that train one model: PyTorch's DDP and FSDP2, started by `torchrun`.

Every process computes the whole batch's rows and reads its own share of them, so that nothing but gradients
and sums travels.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from writehead.model.seq2seq import Seq2Seq
from writehead.stacks.reversible import Reversible
from writehead.train.objective import Objective


class Team:
    """This process among those that train together; alone unless `torchrun` started it.

    Attributes:
        rank, world: which of how many.
        device: where this process computes.
    """

    def __init__(self, strategy: str = "ddp", device: str | None = None) -> None:
        """Join the processes that `torchrun` started.

        Args:
            strategy: "ddp" or "fsdp".
            device: default a GPU if there is one.
        """
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.strategy = strategy
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda" and self.world > 1:
            kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(kind)
        self._began = self.world > 1 and not dist.is_initialized()
        if self._began:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Is this the process that writes files and speaks?"""
        return self.rank == 0

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective as the processes share it; FSDP2 changes it in place."""
        if self.world == 1:
            return objective
        share(objective)
        if self.strategy == "ddp":
            return DistributedDataParallel(objective)
        mesh = init_device_mesh(self.device.type, (self.world,))
        model = objective.model
        for half in (model.encoder, model.decoder) if isinstance(model, Seq2Seq) else (model,):
            if isinstance(half.stack, Reversible):
                continue  # its backward pass needs every layer's weights again, without a call of the layer
            for block in cast(Any, half.stack).blocks:
                if getattr(block, "cross", None) is not None:
                    fully_shard(block.cross, mesh=mesh)
                    register_fsdp_forward_method(block.cross, "remember")
                fully_shard(block, mesh=mesh)
                for name in ("encode", "whole"):
                    if hasattr(block, name):
                        register_fsdp_forward_method(block, name)
        return cast(nn.Module, fully_shard(objective, mesh=mesh))

    @contextmanager
    def syncing(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients only in the backward pass of a step's last piece."""
        if isinstance(wrapped, DistributedDataParallel) and not last:
            with wrapped.no_sync():
                yield
            return
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(last)
        yield

    def sum(self, *values: float) -> list[float]:
        """Each number added up over the processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return cast(list[float], total.tolist())

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the exchange."""
        if self._began and dist.is_initialized():
            dist.destroy_process_group()


def share(model: nn.Module) -> None:
    """Let layers that keep averages in training (centroids) count the rows of all processes.

    From then on every training call must happen in every process. The trainer calls it; whoever wraps a model
    with DistributedDataParallel or FSDP2 by hand calls it before.
    """
    for module in model.modules():
        if hasattr(module, "together"):
            cast(Any, module).together = True


def whole(tensor: Tensor) -> Tensor:
    """A tensor that processes share, put together; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on a parameter's device, shared between the processes as the parameter is."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    there = cast(Any, parameter)
    return distribute_tensor(value.to(there.device), there.device_mesh, there.placements)
