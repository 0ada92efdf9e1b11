"""Optimisers and learning rates: torch's own, their state by the names of the parameters."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from writehead.train.config import OptimConfig


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a run; matrices decay, norms and biases do not.

    Args:
        named: parameters with their names, shared ones once.
        config: the run's optim section.
    """
    parameters = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    first, second = config.betas or (0.9, 0.95)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps or 1e-8, fused=True)


def rate(step: int, config: OptimConfig, steps: int) -> float:
    """The learning rate of a step.

    Args:
        step: from 0.
        config: the run's optim section.
        steps: of the whole run.
    """
    done = step + 1
    if done <= config.warmup:
        return config.lr * done / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(config.warmup / done)
    share = min(1.0, (done - config.warmup) / max(1, steps - config.warmup))
    falling = (1 + math.cos(math.pi * share)) / 2 if config.schedule == "cosine" else 1 - share
    return config.lr * (config.final + (1 - config.final) * falling)


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give all parameters a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip(parameters: Iterable[nn.Parameter], most: float, whole: Callable[[Tensor], Tensor]) -> float:
    """Shrink gradients whose norm is above `most` to it; most steps have none, and pass over them once less.

    Args:
        parameters: their gradients count as one vector.
        most: inf = leave them.
        whole: puts a tensor that processes share together.

    Returns:
        The norm before, which may be no number.
    """
    there = [p for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm([p.grad for p in there if p.grad is not None])
    norm = whole(total).item()
    if norm > most - 1e-5:  # torch's function shrinks by most / (norm + 1e-6)
        nn.utils.clip_grads_with_norm_(there, most, total)
    return norm


def state_of(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    whole: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The optimiser's memory as "PARAMETER:KEY" tensors.

    Args:
        optimizer: what `make_optimizer` made.
        named: its parameters.
        whole: puts a tensor that processes share together.
    """
    return {
        f"{name}:{key}": whole(value)
        for name, parameter in named
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def restore(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
    like: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Give an optimiser the memory that `state_of` gave.

    Args:
        optimizer: a fresh one of the same kind.
        named: its parameters.
        tensors: what was kept.
        like: shares a whole tensor between processes as a parameter is.

    Raises:
        ValueError: memory of a parameter that is not there.
    """
    known = dict(named)
    for key, value in tensors.items():
        name, _, part = key.rpartition(":")
        if name not in known:
            raise ValueError(f"the optimiser's state is of {name!r}, which the model does not have")
        same = value.shape == known[name].shape
        optimizer.state[known[name]][part] = like(value, known[name]) if same and part != "step" else value
