"""Experiments that check what papers say: each is a list of pieces, each piece a run and its scores.

A file holds a record of each piece that is done, so experiments that were stopped go on with the piece at
hand, and that piece with its last checkpoint.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writehead.bench.machine import machine
from writehead.config import ModelConfig
from writehead.core.shapes import check_choice
from writehead.costs import match_ffn_width
from writehead.evaluate.perplexity import score
from writehead.model.decoder import Decoder
from writehead.train.batches import Windows
from writehead.train.config import RunConfig
from writehead.train.start import begin
from writehead.train.tokens import digest

WIKITEXT = "wikitext2.{}.txt.gz"
RECORDS = "results.jsonl"
# heads, key/value heads, and the paper's perplexity of a word of Billion-Word (its Table 3)
HEADS: Mapping[str, tuple[int, int, float]] = {
    "multi-head": (8, 8, 29.9),
    "multi-query": (8, 1, 30.2),
    "1 head": (1, 1, 31.2),
    "2 heads": (2, 2, 31.1),
    "4 heads": (4, 4, 31.0),
    "8 thin heads": (8, 8, 30.9),
}
POSITIONS = ("sinusoidal", "learned", "rotary", "t5", "alibi")
LENGTH, LONGER = 64, (1, 2, 4, 8, 16)  # tokens of training rows; lengths of evaluation, in these


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        dim, depth: of its models.
        steps, batch: of its runs.
        vocab: of its tokenizer.
        tokens: held-out tokens that are scored.
        seeds: of each variant.
    """

    dim: int = 128
    depth: int = 4
    steps: int = 1200
    batch: int = 32
    vocab: int = 2048
    tokens: int = 16384
    seeds: int = 3


@dataclass(frozen=True)
class Piece:
    """One run of an experiment.

    Attributes:
        experiment, variant, seed: which one; together its name.
        run: the whole training run.
        tokens: held-out tokens that are scored at most.
        paper: the paper's figure for the variant, if it has one.
    """

    experiment: str
    variant: str
    seed: int
    run: RunConfig
    tokens: int
    paper: float | None = None

    @property
    def key(self) -> list[Any]:
        """What tells it from other pieces, its scale included."""
        return [self.experiment, self.variant, self.seed, self.tokens, self.run.to_dict()]


def sources(folder: Path | None) -> tuple[dict[str, Any], str]:
    """The data of the experiments and what to say of it: WikiText-2 where it is, else Python's library."""
    files = [folder / WIKITEXT.format(part) for part in ("train", "valid")] if folder else []
    if files and all(path.exists() for path in files):
        return {"train": [str(files[0])], "valid": [str(files[1])]}, f"WikiText-2 in {folder}"
    wanted = ", ".join(WIKITEXT.format(part) for part in ("train", "valid"))
    said = f"no WikiText-2 in {folder} (wanted: {wanted}, the usual files packed with gzip)"
    return {"train": ["stdlib"]}, f"{said}; the experiments run on Python's own sources"


def lm_pieces(data: Mapping[str, Any], scale: Scale) -> list[Piece]:
    """One write-head, language modelling: head sharing and shrunk baselines at equal parameters."""
    width = scale.dim // 8
    like = _model({"name": "mha", "heads": 8, "head_dim": width}, scale, 4 * scale.dim)
    found = []
    for seed in range(scale.seeds):
        for variant, (heads, kv_heads, paper) in HEADS.items():
            size = width if variant in ("multi-head", "multi-query", "1 head") else width // heads
            mixer = {"name": "mha", "heads": heads, "kv_heads": kv_heads, "head_dim": max(1, size)}
            model = _model(mixer, scale, 4 * scale.dim)
            full = [ModelConfig.from_dict({"vocab": scale.vocab, **m}) for m in (model, like)]
            model["feedforward"] = {**model["feedforward"], "hidden": match_ffn_width(*full)}
            run = _run(model, data, scale, seed, 128)
            found.append(Piece("lm", variant, seed, run, scale.tokens, paper))
    return found


def alibi_pieces(data: Mapping[str, Any], scale: Scale) -> list[Piece]:
    """Train short, test long: position schemes trained at one length and evaluated up to 16 times longer."""
    found = []
    for seed in range(scale.seeds):
        for name in POSITIONS:
            position = {"name": name, **({"max_context": LENGTH * max(LONGER)} if name == "learned" else {})}
            model = _model({"name": "mha", "heads": 8}, scale, 4 * scale.dim) | {"position": position}
            run = _run(model, data, scale, seed, LENGTH)
            found.append(Piece("alibi", name, seed, run, scale.tokens))
    return found


EXPERIMENTS: Mapping[str, Callable[[Mapping[str, Any], Scale], list[Piece]]] = {
    "lm": lm_pieces,
    "alibi": alibi_pieces,
}


def pieces(names: Sequence[str], data: Mapping[str, Any], scale: Scale) -> list[Piece]:
    """The pieces of experiments, the first seed of all variants before the second of any.

    Raises:
        ValueError: an experiment that is not there.
    """
    for name in names:
        check_choice("experiment", name, EXPERIMENTS)
    found = [piece for name in names for piece in EXPERIMENTS[name](data, scale)]
    return sorted(found, key=lambda piece: piece.seed)


def work(todo: Iterable[Piece], out: Path, say: Callable[[str], None] = print) -> None:
    """Train and score the pieces that have no record yet; a piece that was stopped resumes.

    Args:
        todo: pieces.
        out: takes the records; runs are below it in `runs`.
        say: takes progress.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = [record["piece"] for record in records(out)]
    for piece in todo:
        name = f"{piece.experiment}, {piece.variant}, seed {piece.seed}"
        if piece.key in done:
            say(f"{name}: done")
            continue
        say(f"{name}: begins")
        folder = out / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{digest(piece.key)[:8]}"
        began = time.perf_counter()
        with begin(piece.run, folder, resume="auto", device="cpu") as trainer:
            trainer.train()
            held = trainer.data.valid
            assert isinstance(held, Windows)
            assert isinstance(trainer.model, Decoder)
            results = _scores(trainer.model.eval(), held, piece)
            parameters = sum(p.numel() for p in trainer.model.parameters())
        record = {
            "piece": piece.key,
            "results": results,
            "parameters": parameters,
            "paper": piece.paper,
            "seconds": time.perf_counter() - began,
            "machine": machine(),
        }
        _append(out / RECORDS, json.dumps(record, allow_nan=False))


def _append(path: Path, line: str) -> None:
    """Add a line, behind one that a crash may have cut off."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line + "\n")
        file.flush()
        os.fsync(file.fileno())


def records(out: Path) -> list[dict[str, Any]]:
    """The records of a folder; a last line that was cut off is left out."""
    path = out / RECORDS
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def of(todo: Iterable[Piece], out: Path) -> list[dict[str, Any]]:
    """The records of these pieces, in their order."""
    found = {json.dumps(record["piece"], sort_keys=True): record for record in records(out)}
    keys = (json.dumps(piece.key, sort_keys=True) for piece in todo)
    return [found[key] for key in keys if key in found]


def table(found: Sequence[Mapping[str, Any]], experiment: str) -> str:
    """A Markdown table of an experiment: means over the seeds, their spread, and the paper's figures."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record in found:
        if record["piece"][0] == experiment:
            rows.setdefault(record["piece"][1], []).append(record)
    columns = list(next(iter(rows.values()))[0]["results"]) if rows else []
    lines = [
        f"| {experiment} | parameters | seeds | {' | '.join(columns)} | paper |",
        f"|---|{'---:|' * (len(columns) + 3)}",
    ]
    for variant, own in rows.items():
        cells = []
        for column in columns:
            values = [record["results"][column] for record in own]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        paper = "" if own[0]["paper"] is None else f"{own[0]['paper']}"
        lines.append(f"| {variant} | {own[0]['parameters']:,} | {len(own)} | {' | '.join(cells)} | {paper} |")
    return "\n".join(lines) + "\n"


def _scores(model: Decoder, held: Windows, piece: Piece) -> dict[str, float]:
    """Nats a token: of windows apart and, for positions, also sliding ones whose tokens all see a long past.

    Sliding by half a window leaves out the early tokens of windows, whose short past is what makes short
    windows look bad: what remains is how well positions that training never had are read.
    """
    tokens = held.tokens[: piece.tokens]
    length = piece.run.data.length
    if piece.experiment != "alibi":
        return {"nats": score(model, tokens, length, length, 16) / (len(tokens) - 1)}
    results = {}
    for times in LONGER:
        window = length * times
        batch = max(1, 64 // times)
        for word, stride in (("apart", window), ("sliding", window // 2)):
            nats = score(model, tokens, window, stride, batch) / (len(tokens) - 1)
            results[f"{word} {window}"] = nats
    return results


def _model(mixer: Mapping[str, Any], scale: Scale, hidden: int) -> dict[str, Any]:
    return {
        "dim": scale.dim,
        "depth": scale.depth,
        "mixer": dict(mixer),
        "feedforward": {"name": "dense", "hidden": hidden, "activation": "relu"},
        "position": {"name": "sinusoidal"},
        "embed_scale": scale.dim**0.5,
    }


def _run(
    model: Mapping[str, Any], data: Mapping[str, Any], scale: Scale, seed: int, length: int
) -> RunConfig:
    tokenizer = {"name": "bpe", "vocab": scale.vocab}
    return RunConfig.from_dict(
        {
            "seed": seed,
            "model": dict(model),
            "data": {**data, "tokenizer": tokenizer, "length": length, "batch": scale.batch},
            "optim": {"lr": 1e-3, "warmup": min(100, scale.steps // 4)},
            "loop": {"steps": scale.steps},
            "report": {"sample": None, "eval_every": 0, "save_every": 200, "log_every": 50, "keep": 1},
        }
    )
