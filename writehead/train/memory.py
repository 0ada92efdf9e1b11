"""What a training step holds at most, before it runs: rehearsed, not run (`rehearsal.py`).

The peak is that of any step but the first, so the optimiser has its memory: weights, gradients, the optimiser's
memory, and whatever the two passes keep and make. It is a sum over tensors; a process holds more (code,
libraries, what its allocator rounds up or keeps).
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from writehead.catalog import FEEDFORWARDS, argument
from writehead.config import ModelConfig
from writehead.core.shapes import check_choice
from writehead.model.blank import KINDS
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Batch
from writehead.train.config import OPTIMISERS, LossConfig, OptimConfig
from writehead.train.objective import Model, Objective, recompute
from writehead.train.optim import make_optimizer
from writehead.train.rehearsal import Ledger, Rehearsal

PLANS = ("plain", "checkpointed", "reversible", "reversible chunked")
CHUNK = 128  # tokens of a piece of chunked feed-forward layers and losses
LONG = 8192  # tokens; longer sequences follow from shorter ones
MOST = 1 << 40  # no batch or length beyond is looked for
Step = Callable[[Callable[[str], None]], None]


@dataclass(frozen=True)
class Setting:
    """How a step is made.

    Attributes:
        batch, length: rows B and tokens T; a seq2seq model reads and writes so many.
        recompute: as `loop.recompute`.
        chunk: as `loss.chunk`.
        precision: as `loop.precision`.
        optimizer: as `optim.name`.
    """

    batch: int = 1
    length: int = 512
    recompute: bool = False
    chunk: int = 0
    precision: str = "float32"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_choice("optimizer", self.optimizer, OPTIMISERS)
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Peak:
    """Bytes of the tensors of a training step.

    Attributes:
        fixed: weights and the optimiser's memory, which are there between steps too.
        kept: what the forward pass leaves for the backward pass, beside them.
        most: all of it at the worst moment.
    """

    fixed: int
    kept: int
    most: int


def preparation(config: ModelConfig, setting: Setting) -> tuple[Model, Step]:
    """A model in training whose optimiser has its memory, and one step of it.

    The step calls its argument after the forward pass, after the backward pass and after the update.

    Raises:
        ValueError: a config whose parts do not fit together, or a length beyond the model's positions.
    """
    model = cast(Model, KINDS[config.kind](config))
    if setting.recompute:
        recompute(model)
    choices = (0, 1) if config.kind == "encoder" else ()
    objective = Objective(model, LossConfig(chunk=setting.chunk), choices).train()
    optimizer = make_optimizer(model.named_parameters(), OptimConfig(name=setting.optimizer))
    tokens = torch.arange(setting.length).remainder(config.vocab).expand(setting.batch, -1).contiguous()
    target = torch.zeros(setting.batch, 1, dtype=torch.int64) if choices else tokens
    batch = Batch(tokens, target, tokens if isinstance(model, Seq2Seq) else None)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step(after: Callable[[str], None] = lambda phase: None) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bfloat16"):
            sums, _ = objective(batch)
        after("forward")
        (sums.loss / batch.scored).backward()
        after("backward")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after("update")

    return model, step


def predict(config: ModelConfig, setting: Setting) -> Peak:
    """The peak of a step; for lengths above `LONG` continued from those of three shorter sequences.

    Raises:
        ValueError: as `preparation`, or a mixer whose step depends on values in a way that no rehearsal
            can follow.
    """
    if setting.length <= LONG:
        return _rehearse(config, setting)
    points = [(T, _rehearse(config, replace(setting, length=T))) for T in (LONG // 4, LONG // 2, LONG)]
    fixed = points[0][1].fixed
    kept, most = (
        _continued([(T, getattr(peak, name)) for T, peak in points], setting.length)
        for name in ("kept", "most")
    )
    return Peak(fixed, kept, most)


def _rehearse(config: ModelConfig, setting: Setting) -> dict[str, int]:
    """Bytes: fixed ones, those kept between both passes, and the most of each phase."""
    ledger = Ledger()
    found: dict[str, int] = {}

    def after(phase: str) -> None:
        found[phase], ledger.peak = ledger.peak, ledger.live
        if phase == "forward":
            found["kept"] = ledger.live - found["fixed"]
        if phase == "backward":
            raise _Enough

    with torch.random.fork_rng(devices=[]), Rehearsal(ledger):
        model, step = preparation(config, setting)
        found["update"] = ledger.peak  # its first one, with all gradients there, holds as much as any
        found["fixed"] = ledger.peak = ledger.live
        with suppress(_Enough):
            step(after)
    return found


class _Enough(Exception):
    """The rest of a step is known."""


def _continued(points: list[tuple[int, int]], length: int) -> int:
    """The parabola through three points where they bend, else the line through the last two."""
    (x0, y0), (x1, y1), (x2, y2) = points
    last = (y2 - y1) / (x2 - x1)
    bend = (last - (y1 - y0) / (x1 - x0)) / (x2 - x0)
    straight = y2 + last * (length - x2)
    bent = bend * (length - x1) * (length - x2)
    return round(straight + (bent if bend * x2 > 0.1 * last else 0))
