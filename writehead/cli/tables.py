"""The tables of `bench` and `demo`."""

from collections.abc import Sequence

from rich.table import Table

from writehead.bench.attention import Attention
from writehead.bench.decode import OURS, Row
from writehead.bench.heads import Shared
from writehead.bench.kernels import Row as Product
from writehead.bench.plots import all_heads
from writehead.bench.quality import Quality
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


def quality_table(found: Sequence[Quality]) -> Table:
    """Perplexity and agreement of each engine."""
    grid = table("engine", "tokens", "perplexity", "agrees with the first", "standard error")
    for one in found:
        share, error = f"{one.agreement:.2%}", f"{one.agreement_error:.2%}"
        grid.add_row(one.engine, f"{one.tokens:,}", f"{one.perplexity:.3f}", share, error)
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


def kernels_table(rows: Sequence[Product]) -> Table:
    """Microseconds and rate of each product, and the share of them that reading the weights takes."""
    grid = table("matrix", "rows", "product", "us", "GB/s", "of bandwidth", "10^9 op/s")
    for row in rows:
        seconds = row.timing.median
        read = f"{row.weight_bytes / seconds / 1e9:.1f}"
        where = (f"{row.n} x {row.k}", str(row.rows), row.name)
        grid.add_row(*where, f"{seconds * 1e6:.0f}", read, f"{row.share:.0%}", f"{row.rate / 1e9:.0f}")
    return grid
