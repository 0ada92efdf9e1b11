"""Trains and scores the pieces of experiments: what was stopped goes on, what is done is never done again.

A file holds a record of each piece that is done, so experiments that were stopped go on with the piece at
hand, and that piece with its last checkpoint. Several processes may work on one folder.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from writehead.bench.experiments import LONGER, Piece, essence
from writehead.bench.machine import machine
from writehead.evaluate.perplexity import score
from writehead.evaluate.translation import translation
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Windows
from writehead.train.loop import Trainer
from writehead.train.start import Busy, begin
from writehead.train.tokens import digest

RECORDS = "results.jsonl"


def work(
    todo: Iterable[Piece],
    out: Path,
    runs: Path,
    say: Callable[[str], None] = print,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train and score the pieces that have no record yet; a piece that was stopped resumes.

    Args:
        todo: pieces.
        out: takes the records.
        runs: takes the runs; a piece that another process trains there is left to it.
        say: takes progress.
        after: called after each record.

    Raises:
        ValueError: translations without sacreBLEU.
    """
    todo = list(todo)
    if any(piece.tested for piece in todo) and find_spec("sacrebleu") is None:
        raise ValueError("translations are scored with sacreBLEU: pip install writehead[translate]")
    out.mkdir(parents=True, exist_ok=True)
    for piece in todo:
        folder = runs / f"{piece.name.replace(', ', '-').replace(' ', '-')}-{digest(piece.key)[:8]}"
        try:
            if of([piece], out):
                say(f"{piece.name}: done")
                continue
            with begin(piece.run, folder, resume="auto", device="cpu") as trainer:
                if not of([piece], out):  # another process may have ended it since
                    say(f"{piece.name}: begins at step {trainer.step}")
                    record = _work(piece, trainer)
                    _append(out / RECORDS, json.dumps(record, allow_nan=False))
                    after()
        except Busy:
            say(f"{piece.name}: another process is at it")


def _work(piece: Piece, trainer: Trainer) -> dict[str, Any]:
    """Train one piece to its end and score it."""
    began, cpu, first = time.perf_counter(), time.process_time(), trainer.step
    trainer.train()
    trained = time.process_time() - cpu
    results, facts = _scores(trainer, piece)
    return {
        "piece": piece.key,
        "results": results,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **facts,
        "from_step": first,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "cpu_seconds_of_a_step": trained / max(1, trainer.step - first),
        "machine": machine(),
    }


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
    found = {_key(record["piece"]): record for record in records(out)}
    keys = (_key(piece.key) for piece in todo)
    return [found[key] for key in keys if key in found]


def others(planned: Iterable[Piece], out: Path) -> int:
    """How many records are of pieces that are not planned."""
    return len(records(out)) - len(of(planned, out))


def _key(piece: list[Any]) -> str:
    """One spelling of a key, whatever options runs had when it was written."""
    return json.dumps([*piece[:-1], essence(piece[-1])], sort_keys=True)


def _scores(trainer: Trainer, piece: Piece) -> tuple[dict[str, float], dict[str, Any]]:
    """The scores of a trained piece, and what else is to be known of them."""
    model = trainer.model.eval()
    if isinstance(model, Seq2Seq):
        return _translated(model, trainer, piece)
    held = trainer.data.valid
    assert isinstance(held, Windows)
    assert isinstance(model, Decoder)
    return _nats(model, held, piece), {"scored": min(len(held.tokens), piece.tokens) - 1}


def _translated(model: Seq2Seq, trainer: Trainer, piece: Piece) -> tuple[dict[str, float], dict[str, Any]]:
    """ln PPL of the references and lower-cased BLEU, greedy and with the paper's beams of 4 and alpha 0.6."""
    results: dict[str, float] = {}
    facts: dict[str, Any] = {}
    assert trainer.data.tokenizer is not None
    for name, beams in (("BLEU greedy", 1), ("BLEU beam 4", 4)):
        found = translation(
            model,
            trainer.data.tokenizer,
            piece.tested,
            num_beams=beams,
            length_penalty=0.6,
            beam_rule="gnmt",
            lowercase=True,
            most=piece.tokens,
        )
        results |= {"ln PPL": found.nll, name: found.bleu}
        facts = {"signature": found.signature, "scored": found.sentences, "said": list(found.texts[:3])}
    return results, facts


def _nats(model: Decoder, held: Windows, piece: Piece) -> dict[str, float]:
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
