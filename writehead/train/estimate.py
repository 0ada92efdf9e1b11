"""What a run costs, before it runs: counted, and measured on one piece of its first batch."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from writehead.core.work import Call
from writehead.costs import costs, parameters, read_costs, skeleton
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Batch
from writehead.train.config import RunConfig
from writehead.train.objective import Model, Objective, recompute
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
    """Prepare the data, build the model and run one piece of a batch twice.

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
        kept, seconds = _measure(objective, piece)
        return Estimate(
            parameters=parameters(model),
            fixed_bytes=4 * size * COPIES[run.optim.name],
            activation_bytes=kept,
            tokens=batch.read,
            flops=BACKWARD * _forward_flops(skeleton(config), batch),
            step_s=seconds * run.loop.accumulate,
            epochs=run.loop.steps / data.train.count,
        )


def _measure(objective: Objective, piece: Batch) -> tuple[int, float]:
    """Bytes that the forward pass of a piece keeps, and seconds of both passes, the better of two."""
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    best = float("inf")
    for _ in range(2):
        held.clear()
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sums, _ = objective(piece)
        sums.loss.backward()
        best = min(best, time.perf_counter() - began)
    return sum(held.values()), best


def _forward_flops(model: Model, batch: Batch) -> int:
    rows, length = batch.tokens.shape
    source = 0 if batch.source is None else batch.source.shape[1]
    call = Call(batch=rows, tokens=length, context=0, source=source)
    own = costs(model, call).flops
    if batch.alone is not None:
        alone = Call(batch=rows * batch.alone.shape[1], tokens=batch.alone.shape[2], context=0)
        own += costs(model, alone).flops
    return own + (read_costs(model, call).flops if isinstance(model, Seq2Seq) else 0)
