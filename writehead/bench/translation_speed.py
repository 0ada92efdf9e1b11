"""How long a token takes in training, encoding and decoding, by kind of attention: Table 2 of Shazeer 2019.

The translation model has the paper's shape; batches are smaller. Beside the measurement stand two predictions
by the same formulas: the least time on this machine and on the paper's accelerator.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from writehead.bench.machine import Roofs, roofs
from writehead.bench.measure import write_record
from writehead.config import ModelConfig
from writehead.core.work import Call
from writehead.costs import costs, read_costs, skeleton
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate
from writehead.decode.options import Options
from writehead.model.seq2seq import Seq2Seq

RECORD = "speed.json"
PHASES = ("training", "encode", "greedy", "beam 4")
# microseconds a token in the paper: training; encoder and decoder of a greedy search; decoder of 4 beams
PAPER: Mapping[str, tuple[float, float, float, float]] = {
    "multi-head": (13.2, 1.7, 46.0, 203.0),
    "multi-query": (13.0, 1.5, 3.8, 32.0),
    "multi-head local": (13.2, 1.7, 23.0, 47.0),
    "multi-query local": (13.0, 1.5, 3.3, 16.0),
}
THEIRS = Roofs.given(4 * 600e9, 4 * 46e12)  # TPUv2, 8 cores: 4 chips of 600 GB/s and 46 TFLOP/s in 16 bits


@dataclass(frozen=True)
class Shape:
    """The paper's model and what one call of ours takes of its batches.

    Attributes:
        dim, heads, hidden, shared_hidden, vocab, window: of the model; `shared_hidden` with one write-head.
        depth: layers of encoder and decoder each.
        length: tokens of sources and targets.
        batch: sentences that are decoded together; a quarter of it with beams, so as many rows.
        trained: sentences of a training step and of an encoder call.
    """

    dim: int = 1024
    heads: int = 8
    hidden: int = 4096
    shared_hidden: int = 5440
    vocab: int = 33708
    window: int = 32
    depth: int = 6
    length: int = 128
    batch: int = 16
    trained: int = 2


@dataclass(frozen=True)
class Cell:
    """One variant in one phase, in microseconds a token.

    Attributes:
        variant, phase: which one.
        measured, samples: the fastest, and all.
        least: what bytes and operations allow this machine at our batch.
        paper, paper_least: the paper's measurement, and what its accelerator allows at the paper's batch.
    """

    variant: str
    phase: str
    measured: float
    samples: tuple[float, ...]
    least: float
    paper: float
    paper_least: float

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def config(shape: Shape, variant: str) -> ModelConfig:
    """The model of a variant: all its attentions share heads or none, local ones in the decoder only."""
    kv_heads = 1 if variant.startswith("multi-query") else shape.heads
    mixer: dict[str, Any] = {"name": "mha", "heads": shape.heads, "kv_heads": kv_heads}
    local = {"pattern": {"name": "window", "window": shape.window}} if variant.endswith("local") else {}
    half = {
        "vocab": shape.vocab,
        "dim": shape.dim,
        "depth": shape.depth,
        "feedforward": {
            "name": "dense",
            "hidden": shape.shared_hidden if kv_heads == 1 else shape.hidden,
            "activation": "relu",
        },
        "position": {"name": "learned", "max_context": 2 * shape.length},
    }
    encoder = {**half, "kind": "encoder", "mixer": {**mixer, "name": "bidirectional"}}
    cross = {**mixer, "name": "cross"}
    whole = {**half, "kind": "seq2seq", "mixer": {**mixer, **local}, "cross": cross, "encoder": encoder}
    return ModelConfig.from_dict(whole)


def least(
    shape: Shape, variant: str, machine: Roofs, batch: int, itemsize: int, sources_once: bool
) -> dict[str, float]:
    """The least microseconds of a target token by phase.

    Args:
        shape, variant: the model.
        machine: its limits.
        batch: sentences decoded together; with beams four rows each.
        itemsize: bytes of a value.
        sources_once: do the beams of a sentence read its source's keys and values once?
    """
    model = skeleton(config(shape, variant))
    assert isinstance(model, Seq2Seq)
    rate, bandwidth = machine.rate(), machine.bandwidth_at(1 << 40)
    T = shape.length
    whole = Call(batch=batch, tokens=T, source=T, itemsize=itemsize)
    read = read_costs(model, whole)
    found = {
        "training": 3 * (costs(model, whole).flops + read.flops) / rate / whole.rows,
        "encode": read.seconds(bandwidth, rate) / whole.rows,
    }
    kv_heads = 1 if variant.startswith("multi-query") else shape.heads
    a_source = T * kv_heads * 2 * (shape.dim // shape.heads) * itemsize * shape.depth
    for phase, beams in (("greedy", 1), ("beam 4", 4)):
        seconds = 0.0
        for context in range(T):
            one = costs(model, Call(batch=batch * beams, context=context, source=T, itemsize=itemsize))
            spared = batch * (beams - 1) * a_source if sources_once else 0
            seconds += max((one.moved - spared) / bandwidth, one.flops / rate)
        found[phase] = seconds / (batch * T)
    return {phase: seconds * 1e6 for phase, seconds in found.items()}


def measure(shape: Shape = Shape(), rounds: int = 2, say: Callable[[str], None] = print) -> list[Cell]:
    """Measure all variants in turns; the fastest of the rounds counts, since disturbances only add.

    Args:
        shape: of models and batches.
        rounds: turns, after one call of each that warms up.
        say: takes progress.
    """
    here = roofs()
    torch.manual_seed(0)
    models = {variant: Seq2Seq(config(shape, variant)) for variant in PAPER}
    found: dict[tuple[str, str], list[float]] = {}
    for phase in PHASES:
        calls = {variant: _call(shape, phase, model) for variant, model in models.items()}
        for call in calls.values():
            call(2)
        for turn in range(rounds):
            for variant, call in calls.items():
                say(f"{phase}, {variant}, round {turn + 1} of {rounds}")
                found.setdefault((variant, phase), []).append(call(shape.length) * 1e6)
    cells = []
    for variant, theirs in PAPER.items():
        ours = least(shape, variant, here, shape.batch, 4, True)
        paper = least(shape, variant, THEIRS, 1024, 2, False)
        for phase, figure in zip(PHASES, theirs, strict=True):
            samples = found[variant, phase]
            cells.append(
                Cell(variant, phase, min(samples), tuple(samples), ours[phase], figure, paper[phase])
            )
    return cells


def _call(shape: Shape, phase: str, model: Seq2Seq) -> Callable[[int], float]:
    """What gives the seconds of a target token; it decodes as many tokens as it is told."""
    rows = torch.randint(shape.vocab, (shape.trained, shape.length))

    def train(tokens: int) -> float:
        began = time.perf_counter()
        logits, _ = model.train()(rows, rows)
        F.cross_entropy(logits.flatten(0, 1), rows.flatten()).backward()
        model.zero_grad(set_to_none=True)
        return (time.perf_counter() - began) / rows.numel()

    def encode(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.eval().read(rows)
        return (time.perf_counter() - began) / rows.numel()

    if phase in ("training", "encode"):
        return train if phase == "training" else encode
    beams = 4 if phase == "beam 4" else 1
    sources = torch.randint(shape.vocab, (shape.batch // beams, shape.length)).tolist()
    engine = TorchEngine(model)

    def decode(tokens: int) -> float:
        options = Options(max_new_tokens=tokens, num_beams=beams, decoder_start_token_id=0, eos_token_id=())
        times = generate(engine, sources, options).timings
        return times.decode_seconds / times.decode_steps / len(sources)

    return decode


def write_speed(cells: Sequence[Cell], shape: Shape, out: Path) -> None:
    """Keep what was measured, with the machine and the shape."""
    write_record(out / RECORD, "speed of translation", {"cells": cells}, {"shape": asdict(shape)}, seed=0)


def read_speed(out: Path) -> dict[str, Any] | None:
    """The record of a folder, or None."""
    path = out / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cells_of(record: Mapping[str, Any]) -> list[Cell]:
    """The cells of a record."""
    return [Cell(**cell) for cell in record["results"]["cells"]]


def speed_page(record: Mapping[str, Any]) -> list[str]:
    """The lines of the page: microseconds a token, ours and the paper's, beside what each machine allows."""
    cells, shape, machine = cells_of(record), record["extra"]["shape"], record["machine"]
    lines = [
        "## One write-head: speed",
        "",
        f"Shazeer 2019, Table 2: the paper's shape (width {shape['dim']}, {shape['heads']} heads, "
        "feed-forward "
        f"{shape['hidden']} or {shape['shared_hidden']}, {shape['depth']} + {shape['depth']} layers, "
        f"{shape['length']} source and target tokens) in float32 on {machine['threads']} threads of "
        f"{machine['cpu']}, commit {(machine['commit'] or 'unknown')[:10]}. {shape['batch']} rows are "
        "decoded "
        f"together (the paper: 1024 sentences, with 4 beams 4096 rows); {shape['trained']} sentences are "
        "encoded "
        "and trained on (both passes, no optimiser). `least` is the larger of bytes over bandwidth and "
        "operations "
        "over rate, of this machine as measured just before, and of a TPUv2 with 8 cores (2.4 TB/s, 184 "
        "TFLOP/s, "
        "16 bits).",
        "",
        f"| attention | {' | '.join(f'{p} | least | paper | least' for p in PHASES)} |",
        f"|---|{'---:|' * (4 * len(PHASES))}",
    ]
    for variant in PAPER:
        own = {cell.phase: cell for cell in cells if cell.variant == variant}
        figures = [(c.measured, c.least, c.paper, c.paper_least) for c in (own[p] for p in PHASES)]
        lines.append(f"| {variant} | {' | '.join(_plain(x) for four in figures for x in four)} |")
    lines += ["", "Microseconds of a target token. Multi-head over multi-query:", ""]
    for phase in ("greedy", "beam 4"):
        for end in ("", " local"):
            a, b = (next(c for c in cells if (c.variant, c.phase) == (f"{name}{end}", phase))
                    for name in ("multi-head", "multi-query"))  # fmt: skip
            lines.append(
                f"- {phase}{end}: {a.measured / b.measured:.2f} measured, {a.least / b.least:.2f} "
                "predicted here; "
                f"{a.paper / b.paper:.1f} in the paper, {a.paper_least / b.paper_least:.2f} predicted there."
            )
    return lines


def _plain(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
