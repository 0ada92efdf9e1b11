"""The memory of a training step: predicted (`train/memory.py`) and measured, each cell in a fresh process.

Two peaks are measured: that of tensors, from the allocator's own events, which is what is predicted; and that
of the process, its resident size beyond what it was before the model was made, which also counts what kernels
and the allocator take for themselves.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from writehead.bench.plots import INK, _pyplot, _save
from writehead.bench.scaling import _highest
from writehead.config import ModelConfig
from writehead.train.memory import PLANS, Peak, Setting, largest, plans, predict, preparation

Say = Callable[[str], None]
DEPTHS = (2, 4, 8, 16, 32, 48)
BERT_LENGTHS = (64, 128, 256, 320, 384, 512)
PUBLISHED = (12, 6, 2, 1, 0, 0)  # google-research/bert, README: one Titan X of 12 GB, TensorFlow 1.11, Adam
BERT_PLANS = (PLANS[0], PLANS[1], PLANS[3])
STEPS = 5  # of which the fastest counts
TINY = ModelConfig(vocab=8, dim=8, depth=1, mixer={"name": "mqa", "heads": 2})


@dataclass(frozen=True)
class Cell:
    """One step: predicted, and measured unless it was not.

    Attributes:
        name, plan: what was trained, and which of `PLANS` it is.
        depth, batch, length: of the model and the step.
        predicted: bytes of tensors.
        tensors, resident: bytes measured.
        step_s: processor seconds of a step on one thread, the best of five: a busy neighbour adds little.
        error: why it was not measured.
    """

    name: str
    plan: str
    depth: int
    batch: int
    length: int
    predicted: int
    tensors: int = 0
    resident: int = 0
    step_s: float = 0.0
    error: str = ""

    @property
    def off(self) -> float:
        """How far the prediction lies above (+) or below what tensors took, as a share of that."""
        return self.predicted / self.tensors - 1 if self.tensors else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return {**asdict(self), "off": self.off}


def cases() -> dict[str, tuple[ModelConfig, Setting]]:
    """Models and steps of several kinds, small enough for any machine."""
    heads: dict[str, Any] = {"heads": 4}
    small: dict[str, Any] = {"vocab": 512, "dim": 128, "depth": 6}
    near = {"name": "local_mqa", **heads, "pattern": {"name": "window", "window": 128}}
    return {
        "one write-head": (ModelConfig(**small, mixer={"name": "mqa", **heads}), Setting(8, 256)),
        "encoder": (bert(dim=128, depth=6, vocab=2048), Setting(8, 256)),
        "window and LSH": (
            ModelConfig(**small, mixer=(near, {"name": "reformer", **heads})), Setting(1, 1024)
        ),
        "linear": (ModelConfig(**small, mixer={"name": "linear", **heads}), Setting(4, 512)),
        "T5 bias": (
            ModelConfig(**small, mixer={"name": "mha", **heads}, position={"name": "t5"}), Setting(4, 256)
        ),
    }  # fmt: skip


def bert(dim: int = 1024, depth: int = 24, vocab: int = 30522) -> ModelConfig:
    """BERT-Large, or the same model narrower or shallower; it classifies its texts."""
    return ModelConfig(
        kind="encoder",
        vocab=vocab,
        dim=dim,
        depth=depth,
        mixer={"name": "mha", "heads": max(1, dim // 64), "bias": "all"},
        feedforward={"name": "dense", "hidden": 4 * dim, "activation": "gelu", "bias": True},
        position={"name": "learned", "max_context": 512},
        stack={"name": "residual", "order": "post", "norm": "layer", "dropout": 0.1},
        embed_norm=True,
    )


LARGE = bert()


def measure(config: Mapping[str, Any], setting: Mapping[str, Any]) -> tuple[int, int, float]:
    """Tensors' and the process's peak, and processor seconds of a step; in the process that calls it."""
    torch.set_num_threads(1)
    model, how = ModelConfig.from_dict(config), Setting(**setting)
    preparation(TINY, Setting(1, 4))(lambda phase: None)  # what torch loads with the first step
    before, times = _highest(reset=True), []
    step = preparation(model, how)
    for _ in range(STEPS):
        start = time.process_time()
        step(lambda phase: None)
        times.append(time.process_time() - start)
    resident = _highest() - before
    del step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        preparation(model, how)(lambda phase: None)
    return _peak(watch), resident, min(times)


def _peak(watch: profile) -> int:
    """The most bytes between the allocator's events."""
    found = watch.profiler
    assert found is not None
    assert found.kineto_results is not None
    events: list[Any] = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def run(todo: Iterable[tuple[Cell, ModelConfig, Setting]], say: Say) -> list[Cell]:
    """Measure cells that are predicted already, one after the other."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is loaded once, processes are new
    found = []
    for cell, config, setting in todo:
        say(f"{cell.name}, {cell.plan}, {cell.depth} layers, {cell.batch} x {cell.length}")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                tensors, resident, step_s = pool.submit(measure, config.to_dict(), asdict(setting)).result()
                found.append(replace(cell, tensors=tensors, resident=resident, step_s=step_s))
            except (BrokenProcessPool, RuntimeError, MemoryError) as problem:
                found.append(replace(cell, error=f"{type(problem).__name__}: {problem}"))
    return found


def _cells(
    name: str, config: ModelConfig, setting: Setting, wanted: Sequence[str] = PLANS
) -> list[tuple[Cell, ModelConfig, Setting]]:
    found = []
    for plan, way in plans(config, setting).items():
        if plan in wanted:
            size = (config.depth, setting.batch, setting.length)
            found.append((Cell(name, plan, *size, predict(*way).most), *way))
    return found


def accuracy(say: Say = print) -> list[Cell]:
    """Every case of `cases` in every plan."""
    todo = [cell for name, (config, how) in cases().items() for cell in _cells(name, config, how)]
    return run(todo, say)


def depth(depths: Sequence[int] = DEPTHS, say: Say = print) -> list[Cell]:
    """One small model with more and more layers: plain, checkpointed and reversible."""
    todo = []
    for layers in depths:
        config = ModelConfig(vocab=256, dim=64, depth=layers, mixer={"name": "mha", "heads": 4})
        todo += _cells("depth", config, Setting(4, 256), PLANS[:3])
    return run(todo, say)


@dataclass(frozen=True)
class Fit:
    """The largest batch of a plan at one length.

    Attributes:
        plan, length, batch: which, and the answer.
        peak: what it takes, or what a batch of 1 would take if none fits.
        measured: the scaled-down model's step at its largest batch; None where there is none.
    """

    plan: str
    length: int
    batch: int
    peak: Peak
    measured: Cell | None = None

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        measured = None if self.measured is None else self.measured.to_dict()
        return {**asdict(self), "measured": measured}


def bert_table(
    budget: int = 12 * 10**9,
    lengths: Sequence[int] = BERT_LENGTHS,
    config: ModelConfig = LARGE,
    wanted: Sequence[str] = BERT_PLANS,
    say: Say = print,
) -> list[Fit]:
    """The largest batches of BERT-Large in a budget, predicted."""
    found = []
    for length in lengths:
        for plan, way in plans(config, Setting(1, length)).items():
            if plan in wanted:
                batch, peak = largest(*way, budget)
                say(f"{length} tokens, {plan}: {batch} rows, {peak.most:,} bytes")
                found.append(Fit(plan, length, batch, peak))
    return found


def bert_small(budget: int = 60 * 10**6, lengths: Sequence[int] = (64, 512), say: Say = print) -> list[Fit]:
    """The same for the model at a sixteenth of the width, and its step measured at the largest batch."""
    config, found = bert(dim=64, vocab=1024), []
    for fit in bert_table(budget, lengths, config, say=say):
        way = plans(config, Setting(max(1, fit.batch), fit.length))[fit.plan]
        size = (config.depth, way[1].batch, fit.length)
        cell = Cell("BERT, width 64", fit.plan, *size, predict(*way).most)
        found.append(replace(fit, measured=run([(cell, *way)], say)[0]))
    return found


def depth_plot(cells: Sequence[Cell], path: Path) -> None:
    """Peaks against the number of layers, measured (points) and predicted (lines), and time over plain."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    plain = {cell.depth: cell.step_s for cell in cells if cell.plan == PLANS[0]}
    for colour, plan in zip(INK, dict.fromkeys(cell.plan for cell in cells), strict=False):
        own = [cell for cell in cells if cell.plan == plan and not cell.error]
        layers = [cell.depth for cell in own]
        axes[0].plot(layers, [c.predicted / 1e6 for c in own], "-", color=colour, label=f"{plan}, predicted")
        axes[0].plot(layers, [c.tensors / 1e6 for c in own], "o", color=colour, label="measured")
        axes[1].plot(layers, [c.step_s / plain[c.depth] for c in own], "o-", color=colour, label=plan)
    axes[0].set_ylabel("MB of tensors in a training step", fontsize=8)
    axes[1].set_ylabel("time of a step over plain", fontsize=8)
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("layers", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    _save(figure, path)
