"""What a run costs, before it runs: counted, and measured on one piece of its first batch."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from writehead.core.state import detach
from writehead.core.work import Call
from writehead.costs import costs, parameters, read_costs, skeleton
from writehead.model.decoder import Decoder, DecodeState
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Batch
from writehead.train.config import RunConfig
from writehead.train.objective import Model, Objective, recompute
from writehead.train.optim import clip, make_optimizer
from writehead.train.start import fresh_model, model_config, read_data

BACKWARD = 3  # operations of forward and backward pass, in forward passes
COPIES = {"adamw": 4, "adafactor": 2}  # weights, gradients and the optimiser's memory, in weights


@dataclass(frozen=True)
class Estimate:
    """Costs of a run.

    Attributes:
        parameters: of the model.
        fixed_bytes: weights, gradients and the optimiser's memory.
        activation_bytes: what the forward pass of one piece keeps for the backward pass.
        tokens, flops, step_s: of one step on one process: tokens read, operations, seconds.
        epochs: passes over the data in the whole run.
    """

    parameters: int
    fixed_bytes: int
    activation_bytes: int
    tokens: int
    flops: int
    step_s: float
    epochs: float


def estimate(run: RunConfig) -> Estimate:
    """Prepare the data, build the model, run one piece of a batch three times and update the weights twice.

    Raises:
        ValueError: data or a model that cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="writehead-dry-run-") as folder:
        data = read_data(run, Path(folder))
        config = model_config(run, data)
        batch = data.train(0)
        piece = batch.piece(0, run.loop.accumulate)
        model = fresh_model(run, config)
        if run.loop.recompute:
            recompute(model)
        objective = Objective(model, run.loss, data.choices).train()
        size = sum(p.numel() for p in model.parameters())
        passes = _passes(objective, piece, run.loop.carry_state)
        kept = _kept(objective, passes)
        seconds = min(_timed(passes) for _ in range(2))
        update = _timed(_update(model, run))
        return Estimate(
            parameters=parameters(model),
            fixed_bytes=4 * size * COPIES[run.optim.name],
            activation_bytes=kept,
            tokens=batch.read,
            flops=BACKWARD * _forward_flops(skeleton(config), batch),
            step_s=seconds * run.loop.accumulate + update,
            epochs=run.loop.steps / data.train.count,
        )


def _passes(objective: Objective, piece: Batch, carried: bool) -> Callable[[], None]:
    """Both passes of a piece, with the state of the call before if states are carried."""
    model = objective.model
    state = model.init_state(len(piece.tokens)) if carried and isinstance(model, Decoder) else None

    def passes() -> None:
        nonlocal state
        sums, after = objective(piece, state)
        sums.loss.backward()
        state = None if after is None else cast(DecodeState, detach(after))

    return passes


def _kept(objective: Objective, passes: Callable[[], None]) -> int:
    """Bytes that the forward pass of a piece keeps; afterwards there are gradients."""
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        passes()
    return sum(held.values())


def _update(model: Model, run: RunConfig) -> Callable[[], None]:
    """What follows the passes of a step, once more: its first time makes the optimiser's memory."""
    optimizer = make_optimizer(model.named_parameters(), run.optim)

    def update() -> None:
        clip(model.parameters(), run.loop.clip or math.inf, lambda norm: norm)
        optimizer.step()

    update()
    return update


def _timed(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _forward_flops(model: Model, batch: Batch) -> int:
    rows, length = batch.tokens.shape
    source = 0 if batch.source is None else batch.source.shape[1]
    call = Call(batch=rows, tokens=length, context=0, source=source)
    own = costs(model, call).flops
    if batch.alone is not None:
        alone = Call(batch=rows * batch.alone.shape[1], tokens=batch.alone.shape[2], context=0)
        own += costs(model, alone).flops
    return own + (read_costs(model, call).flops if isinstance(model, Seq2Seq) else 0)
