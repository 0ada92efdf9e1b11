"""What a training step holds at most, before it runs: rehearsed, not run (`rehearsal.py`).

The peak is that of any step but the first, so the optimiser has its memory: weights, gradients, that memory,
and whatever the two passes keep and make. It is a sum over tensors; a process holds more (code, libraries,
what its allocator rounds up or keeps).
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import lcm
from typing import cast

import torch
from torch import nn

from writehead.catalog import STACKS, find
from writehead.config import ModelConfig
from writehead.core.shapes import check_choice
from writehead.model.blank import KINDS, blank
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Batch
from writehead.train.config import OPTIMISERS, LossConfig, OptimConfig
from writehead.train.objective import Model, Objective, recompute
from writehead.train.optim import make_optimizer
from writehead.train.rehearsal import Ledger, Rehearsal

PLANS = ("plain", "checkpointed", "reversible", "reversible chunked")
CHUNK = 128  # tokens of a piece of chunked feed-forward layers and losses
PHASES = ("forward", "backward", "update")
LONG = 4096  # tokens; longer sequences follow from shorter ones
DEEP = 4  # repeats of the layers' kinds; deeper models follow from shallower ones
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


def preparation(config: ModelConfig, setting: Setting) -> Step:
    """One step of a model in training whose optimiser has its memory.

    It calls its argument after the forward pass, after the backward pass and after the update.

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

    return step


def predict(config: ModelConfig, setting: Setting) -> Peak:
    """The peak of a step.

    Lengths above `LONG` and depths above `DEEP` repeats of the layers are continued from smaller ones.

    Raises:
        ValueError: as `preparation`, or a mixer whose step depends on values in a way that no rehearsal
            can follow.
    """
    if setting.length > LONG:
        lengths = (LONG // 4, LONG // 2, LONG)
        found = [_at_depth(config, replace(setting, length=T)) for T in lengths]
        made = {name: _continued(lengths, [one[name] for one in found], setting.length) for name in found[0]}
    else:
        made = _at_depth(config, setting)
    return Peak(made["fixed"], made["kept"], max(made[phase] for phase in PHASES))


def _at_depth(config: ModelConfig, setting: Setting) -> dict[str, int]:
    """`_rehearse`, of deep models along the line through two with fewer layers of the same kinds."""
    halves = [config] if config.encoder is None else [config, config.encoder]
    period = max(_period(half) for half in halves)
    least, most = DEEP // 2 * period, DEEP * period
    if len(halves) > 1 or config.depth <= most:
        return _rehearse(config, setting)
    rest = config.depth % period
    low, high = (_rehearse(replace(config, depth=depth + rest), setting) for depth in (least, most))
    steps = (config.depth - rest - most) / (most - least)
    return {name: round(high[name] + steps * (high[name] - low[name])) for name in high}


def _period(config: ModelConfig) -> int:
    """Layers after which mixers and feed-forward layers repeat."""
    kinds = (config.mixer, config.feedforward)
    return lcm(*(len(kind) if isinstance(kind, tuple) else 1 for kind in kinds))


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

    with torch.random.fork_rng(devices=[]), _uncollected(), Rehearsal(ledger):
        step = preparation(config, setting)
        found["update"] = ledger.peak  # its first one, with all gradients there, holds as much as any
        found["fixed"] = ledger.peak = ledger.live
        with suppress(_Enough):
            step(after)
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector, which comes when it likes, from deciding what is still alive."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class _Enough(Exception):
    """The rest of a step is known."""


def _continued(lengths: Sequence[int], values: Sequence[int], length: int) -> int:
    """The parabola through three points where they bend, else the line through the last two."""
    (x0, x1, x2), (y0, y1, y2) = lengths, values
    last = (y2 - y1) / (x2 - x1)
    bend = (last - (y1 - y0) / (x1 - x0)) / (x2 - x0)
    straight = y2 + last * (length - x2)
    return round(straight + (bend * (length - x1) * (length - x2) if bend * x2 > 0.1 * last else 0))


def plans(config: ModelConfig, setting: Setting) -> dict[str, tuple[ModelConfig, Setting]]:
    """The ways to train a model in less memory: the config and setting of each of `PLANS`.

    A reversible stack is pre-norm, so a post-norm or parallel model becomes another one of the same size.
    """
    plain, turned = _restacked(config, "residual"), _restacked(config, "reversible")
    chunked = replace(setting, chunk=setting.chunk or CHUNK)
    return {
        "plain": (plain, setting),
        "checkpointed": (plain, replace(setting, recompute=True)),
        "reversible": (turned, setting),
        "reversible chunked": (_chunked(turned), chunked),
    }


def _restacked(config: ModelConfig, name: str) -> ModelConfig:
    """The model with another stack; what both stacks have (norm, eps, dropout, last_norm) stays."""
    encoder = None if config.encoder is None else _restacked(config.encoder, name)
    own = config.stack
    if find(STACKS, own).name != name:
        own = {k: v for k, v in own.items() if k in ("norm", "eps", "dropout", "last_norm")}
        own = {"name": name, **own}
    return replace(config, stack=own, encoder=encoder)


def _chunked(config: ModelConfig) -> ModelConfig:
    """The model with dense feed-forward layers in pieces."""
    encoder = None if config.encoder is None else _chunked(config.encoder)
    specs = config.feedforward if isinstance(config.feedforward, tuple) else (config.feedforward,)
    made = tuple({**s, "name": "chunked", "chunk": CHUNK} if s["name"] == "dense" else s for s in specs)
    return replace(config, feedforward=made, encoder=encoder)


def largest(config: ModelConfig, setting: Setting, budget: int, what: str = "batch") -> tuple[int, Peak]:
    """The largest batch, or length, whose step fits; 0 and the peak of 1 where none does.

    Args:
        config, setting: the model and the step; the setting's own batch or length does not matter.
        budget: bytes.
        what: "batch" or "length".

    Raises:
        ValueError: as `predict`, or a budget below 1.
    """
    check_choice("what", what, ("batch", "length"))
    if budget < 1:
        raise ValueError(f"budget={budget} must be at least 1 byte")
    ceiling = (_longest(config) if what == "length" else None) or MOST
    known: dict[int, Peak] = {}

    def peak(size: int) -> int:
        if size not in known:
            at = replace(setting, batch=size) if what == "batch" else replace(setting, length=size)
            known[size] = predict(config, at)
        return known[size].most

    low, high = 1, min(8, ceiling)
    if peak(low) > budget:
        return 0, known[1]
    while peak(high) <= budget:
        if high == ceiling:
            return high, known[high]
        slope = max(1e-9, (peak(high) - peak(low)) / max(1, high - low))
        low, high = (
            high,
            min(ceiling, max(high + 1, min(64 * high, int(high + (budget - peak(high)) / slope) + 1))),
        )
    while high - low > 1:  # peak(low) <= budget < peak(high), and nearly a line between them
        share = (budget - peak(low)) / (peak(high) - peak(low))
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        low, high = (middle, high) if peak(middle) <= budget else (low, middle)
    return low, known[low]


def _longest(config: ModelConfig) -> int | None:
    """Positions that the model has; None = no limit."""
    half = cast(Decoder | Encoder, blank(config if config.encoder is None else config.encoder))
    limits = [half.embedding.position.max_context, config.max_context]
    return min((n for n in limits if n is not None), default=None)
