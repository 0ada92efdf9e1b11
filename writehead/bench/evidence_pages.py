"""The page of the evidence: what was run, what is missing, our figures beside the papers', from records."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from writehead.bench.evidence import of
from writehead.bench.evidence_claims import CLAIMS
from writehead.bench.evidence_longer import longer_page
from writehead.bench.evidence_plots import plot, speed_plot
from writehead.bench.experiments import LENGTH, LOCAL, LONGER, WINDOW, Piece
from writehead.bench.translation_speed import cells_of, read_speed, speed_page
from writehead.convert.writing import replacing

Record = Mapping[str, Any]
Rows = Mapping[str, list[Record]]
NOTES = "notes.md"  # written by hand, beside the page
TITLES = {
    "translation": "One write-head: translation",
    "lm": "One write-head: language modelling",
    "alibi": "ALiBi: train short, test long",
}
ASKED = {
    "translation": "Shazeer 2019 (arXiv:1911.02150), Table 1: at equal parameters multi-query attention "
    "loses little against multi-head attention, and shrunk multi-head attention loses more.",
    "lm": "Shazeer 2019, Table 3: the same for language models.",
    "alibi": "Press, Smith, Lewis 2021 (arXiv:2108.12409): with ALiBi a model trained on short rows reads "
    "longer ones without loss; with sinusoidal positions it does not.",
}
# translation: newstest2013 (dev) and newstest2014 (test); lm: Billion-Word
PAPER: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "translation": {
        "": ("ln PPL of dev", "BLEU of dev", "BLEU of test, greedy / beam 4"),
        "multi-head": ("1.424", "26.7", "27.7 / 28.4"),
        "multi-query": ("1.439", "26.5", "27.5 / 28.5"),
        "multi-head local": ("1.427", "26.6", "27.5 / 28.3"),
        "multi-query local": ("1.437", "26.5", "27.6 / 28.2"),
        "1 head": ("1.518", "25.8", ""),
        "2 heads": ("1.480", "26.2", "26.8 / 27.9"),
        "4 heads": ("1.488", "26.1", ""),
        "8 thin heads": ("1.513", "25.8", ""),
    },
    "lm": {
        "": ("perplexity of a word",),
        "multi-head": ("29.9",),
        "multi-query": ("30.2",),
        "1 head": ("31.2",),
        "2 heads": ("31.1",),
        "4 heads": ("31.0",),
        "8 thin heads": ("30.9",),
    },
}


def write(planned: Sequence[Piece], out: Path, said: Sequence[str]) -> None:
    """Write README.md and the plots of experiments from the records that there are.

    Args:
        planned: all pieces, done or not.
        out: the folder of the records.
        said: what is known of the data.
    """
    parts = [
        "# Evidence",
        "",
        "Written by `make evidence` (`writehead bench evidence`) from `results.jsonl`, `multi30k/*.json` and "
        "`speed.json`: our own small runs, the papers' figures beside them. The scales differ by orders of "
        "magnitude, so only differences between the lines of a table compare. ± is the standard deviation "
        "over seeds.",
    ]
    if (out / NOTES).exists():
        parts += ["", f"[What we make of them]({NOTES})."]
    for name in dict.fromkeys(piece.experiment for piece in planned):
        own = [piece for piece in planned if piece.experiment == name]
        found = of(own, out)
        parts += ["", *section(name, own, found)]
        if found:
            plot(name, by_variant(found), out / f"{name}.png")
            parts += ["", f"![{TITLES[name]}]({name}.png)"]
        if name == "translation":
            parts += ["", *longer_page(out)]
    speed = read_speed(out)
    if speed is None:
        parts += ["", "## One write-head: speed", "", "Not measured yet: `writehead bench evidence speed`."]
    else:
        speed_plot(cells_of(speed), out / "speed.png")
        parts += ["", *speed_page(speed), "", "![Microseconds a token](speed.png)"]
    parts += ["", *(f"Data: {line}." for line in said)]
    with replacing(out / "README.md") as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")


def section(name: str, planned: Sequence[Piece], found: Sequence[Record]) -> list[str]:
    """The lines of one experiment."""
    rows = by_variant(found)
    lines = [f"## {TITLES[name]}", "", ASKED[name], "", _setting(name, planned)]
    lines += ["", f"**{len(found)} of {len(planned)} runs are done.** {_missing(planned, found)}".rstrip()]
    if not found:
        return lines
    lines += [_budget(found), "", *table(name, rows, planned)]
    claims = CLAIMS[name](rows)
    return [*lines, "", *(f"- {claim}" for claim in claims)] if claims else lines


def by_variant(found: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each variant."""
    rows: dict[str, list[Record]] = {}
    for record in found:
        rows.setdefault(record["piece"][1], []).append(record)
    return rows


def table(name: str, rows: Rows, planned: Sequence[Piece]) -> list[str]:
    """A Markdown table: means over the seeds, their spread, and the paper's figures."""
    if name == "alibi":
        return _lengths(rows)
    columns = list(next(iter(rows.values()))[0]["results"])
    paper = PAPER[name]
    head = ["attention", "heads x width", "feed-forward", "parameters", "seeds", *columns]
    lines = [
        f"| {' | '.join([*head, *(f'paper: {title}' for title in paper[''])])} |",
        f"|---|{'---:|' * (len(head) - 1 + len(paper['']))}",
    ]
    models = {piece.variant: piece.run.model for piece in planned}
    for variant, model in models.items():
        mixer, own = model["mixer"], rows.get(variant, [])
        shape = f"{mixer['heads']} x {mixer['head_dim']}"
        shape += f", {mixer['kv_heads']} shared" if mixer["kv_heads"] < mixer["heads"] else ""
        cells = [variant, shape, str(model["feedforward"]["hidden"])]
        cells += [f"{own[0]['parameters']:,}" if own else "", str(len(own))]
        cells += [_mean([r["results"][column] for r in own]) for column in columns]
        theirs = paper.get(variant, ("",) * len(paper[""]))
        lines.append(f"| {' | '.join([*cells, *theirs])} |")
    return lines


def _lengths(rows: Rows) -> list[str]:
    """Perplexities of position schemes by length, for both protocols."""
    lines = [
        f"| positions | windows | seeds | {' | '.join(f'{LENGTH * times}' for times in LONGER)} |",
        f"|---|---|{'---:|' * (len(LONGER) + 1)}",
    ]
    for variant, own in rows.items():
        for protocol in ("apart", "sliding"):
            cells = [_mean([exp(r["results"][f"{protocol} {LENGTH * t}"]) for r in own], 1) for t in LONGER]
            lines.append(f"| {variant} | {protocol} | {len(own)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The paper's perplexities (WikiText-103, trained on 512, windows apart) at 512 / 1012 / 3512 tokens: "
        "sinusoidal 20.05 / 43.54 / 178.97, rotary 20.07 / 21.37 / 35.54, T5 19.65 / 18.79 / 22.91, "
        "ALiBi 19.73 / 18.73 / 18.40.",
    ]


def _mean(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return ""
    digits = digits if digits < 3 or max(values) < 10 else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _setting(name: str, planned: Sequence[Piece]) -> str:
    """What the runs have in common."""
    run = planned[0].run
    model, data = run.model, run.data
    files, seeds = ", ".join(Path(one).name for one in data.train), len({piece.seed for piece in planned})
    each = f"{model['depth']} + {model['depth']}" if "encoder" in model else f"{model['depth']}"
    lines = [
        f"Ours: {files}, BPE of {data.tokenizer['vocab']} tokens, {each} layers of width {model['dim']}, "
        f"{run.loop.steps} steps of {data.batch} rows, AdamW at {run.optim.lr:g}, "
        f"{seeds} seed{'s' * (seeds > 1)} wanted, the same for all variants."
    ]
    if name == "translation":
        lines.append(
            "All attentions of encoder and decoder share their heads alike, but for the last line, which "
            "is not of the paper. Feed-forward layers are widened until parameters are equal, as in the "
            "paper. Label smoothing 0.1, dropout 0.1; greedy, and 4 beams with the paper's length penalty "
            f"(alpha 0.6). {', '.join(LOCAL)}: the decoder sees {WINDOW} tokens of its own (32 in the "
            "paper, whose sentences are longer)."
        )
    if name == "lm":
        lines.append(
            f"Windows of {data.length} tokens apart, {planned[0].tokens} held-out tokens; nats are of a BPE "
            "token. Feed-forward layers are widened until parameters are equal."
        )
    if name == "alibi":
        lines.append(
            f"Trained on rows of {data.length} tokens. Windows apart score every token of a window, the "
            "early ones with little past; windows that slide by half score their second halves, so the "
            f"early-token effect is out. {planned[0].tokens} held-out tokens."
        )
    return " ".join(lines)


def _missing(planned: Sequence[Piece], found: Sequence[Record]) -> str:
    done = {(record["piece"][1], record["piece"][2]) for record in found}
    rest: dict[str, list[str]] = {piece.variant: [] for piece in planned}
    for piece in planned:
        if (piece.variant, piece.seed) not in done:
            rest[piece.variant].append(str(piece.seed))
    whole = len({piece.seed for piece in planned})
    words = [
        variant if len(seeds) == whole else f"{variant} (seed {', '.join(seeds)})"
        for variant, seeds in rest.items()
        if seeds
    ]
    return f"Missing: {'; '.join(words)}." if words and found else ""


def _budget(found: Sequence[Record]) -> str:
    """What the runs cost and where they ran."""
    steps = [r["cpu_seconds_of_a_step"] * r["piece"][-1]["loop"]["steps"] for r in found]
    cpu = sorted({r["machine"]["cpu"] for r in found})
    commits = sorted({(r["machine"]["commit"] or "unknown")[:10] for r in found})
    threads = sorted({r["machine"]["threads"] for r in found})
    return (
        f"Budget: {sum(steps) / 3600:.1f} core hours of training, {min(steps) / 60:.0f} to "
        f"{max(steps) / 60:.0f} core minutes a run, on {', '.join(map(str, cpu))} "
        f"({', '.join(map(str, threads))} thread, shared with other jobs); commit {', '.join(commits)}."
    )
