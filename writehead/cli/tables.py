"""The tables of `bench` and `demo`."""

from collections.abc import Sequence

from rich.table import Table

from writehead.bench.attention import Attention
from writehead.bench.decode import OURS, Row
from writehead.bench.heads import Shared
from writehead.bench.plots import all_heads
from writehead.bench.scaling import Growth, slopes
from writehead.cli.output import size, table


def decode_table(rows: Sequence[Row]) -> Table:
    """Tokens per second of each engine, its share of the roofline, and ours over the best and over each
    peer."""
    grid = table("cell", "type", "engine", "tokens/s", "quartiles", "of roofline", "ours / it")
    ours = {(row.cell, row.dtype): row for row in rows if row.engine == OURS}
    for row in rows:
        own = ours[row.cell, row.dtype]
        cell = str(row.cell) if row.engine == OURS else ""
        if row.timing.error:
            grid.add_row(cell, row.dtype, row.engine, "failed", row.timing.error[:40], "", "")
            continue
        spread = f"{row.tokens / row.timing.q3:.4g} to {row.tokens / row.timing.q1:.4g}"
        ratio = "" if row.engine == OURS else f"{row.timing.median / own.timing.median:.2f}x"
        share = f"{row.roof_s / row.timing.median:.0%}"
        grid.add_row(cell, row.dtype, row.engine, f"{row.rate:.4g}", spread, share, ratio)
    return grid


def heads_table(cells: Sequence[Shared]) -> Table:
    """Milliseconds of a step for each number of key/value heads, measured beside predicted."""
    grid = table(
        "batch", "context", "kv_heads", "cache", "ms a step", "roofline ms", "times faster", "predicted"
    )
    for cell in cells:
        full = all_heads(cells, cell)
        cache = size(cell.state_bytes)
        predicted = f"{full.roof_s / cell.roof_s:.1f}x"
        roof = f"{cell.roof_s * 1e3:.1f}"
        where = (str(cell.batch), f"{cell.context}", f"{cell.kv_heads} of {cell.heads}", cache)
        if cell.timing is None:
            grid.add_row(*where, "no memory", roof, "", predicted)
            continue
        ratio = f"{full.timing.median / cell.timing.median:.1f}x" if full.timing else ""
        grid.add_row(*where, f"{cell.timing.median * 1e3:.1f}", roof, ratio, predicted)
    return grid


def attention_table(cells: Sequence[Attention]) -> Table:
    """One-token attention with one write-head of 16, beside `enable_gqa`."""
    grid = table("one token", "ours us", "enable_gqa us", "times faster", "of roofline")
    for cell in cells:
        where = f"batch {cell.batch}, context {cell.context}"
        ours, theirs = cell.ours.median * 1e6, cell.enable_gqa.median * 1e6
        share = f"{cell.roof_s / cell.ours.median:.0%}"
        grid.add_row(where, f"{ours:.0f}", f"{theirs:.0f}", f"{cell.times:.1f}x", share)
    return grid


def scaling_table(cells: Sequence[Growth]) -> Table:
    """Seconds and memory of each subject at each length; the last line of each has the slopes."""
    grid = table("attention", "tokens", "forward s", "with backward s", "peak memory")
    for name, found in slopes(cells).items():
        for cell in (c for c in cells if c.name == name):
            if cell.error:
                grid.add_row(name, str(cell.tokens), "failed", cell.error[:40], "")
                continue
            seconds = (f"{cell.forward_s:.3g}", f"{cell.both_s:.3g}")
            grid.add_row(name, str(cell.tokens), *seconds, size(cell.peak_bytes))
        both = f"{found['both_s']:.2f} (theory {found['theory']:g})"
        grid.add_row("", "slope", f"{found['forward_s']:.2f}", both, f"{found['peak_bytes']:.2f}")
    return grid
