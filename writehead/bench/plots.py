"""Plots of what was measured, and its sum."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from writehead.bench.decode import Row
from writehead.bench.heads import Shared
from writehead.bench.kernels import Row as Product

INK = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#4d4d4d")  # apart in grey, too


def decode_plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of tokens per second for each cell, a mark at the roofline."""
    plt = _pyplot()
    kinds = sorted({row.dtype for row in rows}, reverse=True)
    cells = list(dict.fromkeys(row.cell for row in rows))
    figure, axes = plt.subplots(
        len(kinds), len(cells), figsize=(2.3 * len(cells), 2.7 * len(kinds)), squeeze=False
    )
    engines = list(dict.fromkeys(row.engine for row in rows))
    for line, kind in zip(axes, kinds, strict=True):
        for axis, cell in zip(line, cells, strict=True):
            here = [r for r in rows if r.cell == cell and r.dtype == kind and not r.timing.error]
            for row in here:
                place = engines.index(row.engine)
                axis.bar(place, row.rate, color=INK[place % len(INK)], width=0.75, label=row.engine)
                label = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.3g}"
                axis.text(place, row.rate, label, ha="center", va="bottom", fontsize=7)
            if here:
                axis.axhline(here[0].tokens / here[0].roof_s, color="black", linestyle=":", linewidth=1)
            axis.set_title(f"{cell}\n{kind}", fontsize=8)
            axis.set_xticks([])
            axis.margins(y=0.15)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens/s", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=INK[i % len(INK)]) for i in range(len(engines))]
    handles.append(plt.Line2D([], [], color="black", linestyle=":"))
    figure.legend(handles, [*engines, "roofline of this machine"], loc="lower center", ncols=len(engines) + 1,
                  fontsize=8, frameon=False)  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    _save(figure, path)


def kernels_plot(rows: Sequence[Product], path: Path) -> None:
    """Operations per second of each product against the rows of x, a plot for each matrix."""
    plt = _pyplot()
    shapes, names = (
        list(dict.fromkeys(found)) for found in zip(*(((r.n, r.k), r.name) for r in rows), strict=True)
    )
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.6 * len(shapes), 3.3), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name in names:
            line = [(r.rows, r.rate / 1e9) for r in rows if (r.n, r.k, r.name) == (*shape, name)]
            if line:
                axis.plot(*zip(*line, strict=True), "o-", color=INK[names.index(name) % len(INK)],
                          markersize=4, label=name)  # fmt: skip
        counts = sorted({r.rows for r in rows})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_title(f"{shape[0]} outputs, {shape[1]} inputs", fontsize=9)
        axis.set_xlabel("rows", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("10^9 operations a second", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def heads_plot(cells: Sequence[Shared], path: Path) -> None:
    """Time of a step against the context for each number of key/value heads; dotted: the roofline."""
    plt = _pyplot()
    batches = sorted({cell.batch for cell in cells})
    figure, axes = plt.subplots(1, len(batches), figsize=(3.6 * len(batches), 3.3), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for place, kv_heads in enumerate(sorted({c.kv_heads for c in cells}, reverse=True)):
            line = [c for c in cells if (c.batch, c.kv_heads) == (batch, kv_heads)]
            measured = [(c.context, c.timing.median * 1e3) for c in line if c.timing]
            colour, heads = INK[place % len(INK)], line[0].heads
            name = {heads: "multi-head", 1: "multi-query"}.get(kv_heads, "grouped")
            if measured:
                axis.plot(*zip(*measured, strict=True), "o-", color=colour, markersize=4,
                          label=f"{name}: {kv_heads} of {heads}")  # fmt: skip
            axis.plot(
                [c.context for c in line], [c.roof_s * 1e3 for c in line], ":", color=colour, linewidth=1
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        contexts = sorted({c.context for c in cells})
        axis.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts], fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_title(f"batch {batch}", fontsize=9)
        axis.set_xlabel("tokens of context", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("ms a decode step", fontsize=8)
    axes[0][0].legend(title="key/value heads (dotted: roofline)", fontsize=7, title_fontsize=7, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def summary(cells: Sequence[Shared]) -> dict[str, Any]:
    """The largest measured gain of one write-head over all heads, and where."""
    best: dict[str, Any] = {"times": math.nan}
    for cell in cells:
        full = all_heads(cells, cell)
        if cell.kv_heads == 1 and cell.timing and full.timing:
            times = full.timing.median / cell.timing.median
            if not times <= best["times"]:
                predicted = full.roof_s / cell.roof_s
                best = {"times": times, "predicted": predicted, "batch": cell.batch, "context": cell.context}
    return best


def all_heads(cells: Sequence[Shared], like: Shared) -> Shared:
    """The multi-head cell of the same batch and context."""
    same = (like.batch, like.context)
    return next(c for c in cells if (c.batch, c.context) == same and c.kv_heads == c.heads)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'writehead[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    """A PNG, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        _pyplot().close(figure)
