"""Plots of the evidence: every run a dot, their means a line."""

import statistics
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from writehead.bench.experiments import LENGTH, LONGER, POSITIONS, TRANSLATORS
from writehead.bench.plots import INK, _pyplot, _save
from writehead.bench.translation_speed import PAPER, PHASES, Cell

Rows = Mapping[str, list[Mapping[str, Any]]]
COLUMNS = {
    "translation": (
        ("BLEU beam 4", "BLEU, 4 beams (higher is better)"),
        ("ln PPL", "ln PPL (lower is better)"),
    ),
    "lm": (("nats", "nats a token (lower is better)"),),
}


def plot(name: str, rows: Rows, path: Path) -> None:
    """The plot of an experiment."""
    if name == "alibi":
        _lengths(rows, path)
    else:
        _variants(rows, COLUMNS[name], path)


def _variants(rows: Rows, columns: Sequence[tuple[str, str]], path: Path) -> None:
    """A line of dots for each variant, one panel for each score."""
    plt = _pyplot()
    names = [name for name in TRANSLATORS if name in rows]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(4.2 * len(columns), 0.38 * len(names) + 1.1), squeeze=False, sharey=True
    )
    for axis, (column, title) in zip(axes[0], columns, strict=True):
        for place, name in enumerate(names):
            values = [record["results"][column] for record in rows[name]]
            colour = INK[0] if name.startswith("multi-head") else INK[1] if "query" in name else INK[5]
            axis.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.6)
            axis.plot(
                [statistics.fmean(values)], [place], "|", color=colour, markersize=16, markeredgewidth=2
            )
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def _lengths(rows: Rows, path: Path) -> None:
    """Perplexity against the length of evaluation, windows apart and sliding."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), sharey=True)
    lengths = [LENGTH * times for times in LONGER]
    titles = {"apart": "windows apart", "sliding": "windows slide by half: no early tokens"}
    for axis, (protocol, title) in zip(axes, titles.items(), strict=True):
        for place, name in enumerate(POSITIONS):
            if name not in rows:
                continue
            runs = [[exp(r["results"][f"{protocol} {length}"]) for length in lengths] for r in rows[name]]
            colour = INK[place % len(INK)]
            for run in runs:
                axis.plot(lengths, run, ".", color=colour, markersize=4, alpha=0.6)
            axis.plot(
                lengths, [statistics.fmean(c) for c in zip(*runs, strict=True)], "-", color=colour, label=name
            )
        axis.axvline(LENGTH, color="black", linewidth=1, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"tokens of a window (trained on {LENGTH}, dotted)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("perplexity of a token", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def speed_plot(cells: Sequence[Cell], path: Path) -> None:
    """Microseconds a token, ours and the paper's, with a mark at the least time that the machine allows."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.2))
    titles = ("this machine", "paper: TPUv2, 8 cores")
    for axis, title, (bar, mark) in zip(
        axes, titles, (("measured", "least"), ("paper", "paper_least")), strict=True
    ):
        for place, variant in enumerate(PAPER):
            own = {cell.phase: cell for cell in cells if cell.variant == variant}
            at = [index + 0.2 * (place - 1.5) for index in range(len(PHASES))]
            colour = INK[place % len(INK)]
            axis.bar(at, [getattr(own[p], bar) for p in PHASES], 0.18, color=colour, label=variant)
            axis.plot(at, [getattr(own[p], mark) for p in PHASES], "_", color="black", markersize=7)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        axis.set_xticks(range(len(PHASES)), PHASES)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("microseconds a token (mark: the least possible)", fontsize=8)
    axes[1].legend(fontsize=7, frameon=False, loc="upper left")
    figure.tight_layout()
    _save(figure, path)
