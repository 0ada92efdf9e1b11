"""The tables of `bench` and `demo`."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from writehead.bench.attention import Attention
from writehead.bench.decode import Row
from writehead.bench.heads import Shared
from writehead.bench.kernels import Row as Product
from writehead.bench.machine import Roofs
from writehead.bench.neighbour import Beside
from writehead.bench.one_token import Row as OneToken
from writehead.bench.plots import all_heads
from writehead.bench.quality import Quality
from writehead.bench.scaling import Growth, slopes
from writehead.cli.output import size, table
from writehead.decode.result import Timings


@dataclass(frozen=True)
class Answer:
    """What one answer cost: the engine's name, the type of its weights, and the times."""

    engine: str
    dtype: str
    timings: Timings


def answers_table(answers: Sequence[Answer], limits: Roofs) -> Table:
    """Speeds of an answer by engine and weights, and the share of the memory's speed that it reached."""
    grid = table("engine", "weights", "prefill tokens/s", "decode tokens/s", "a token reads", "of bandwidth")
    for answer in answers:
        t = answer.timings
        share = t.bandwidth / limits.bandwidth_at(int(t.bytes_per_token))
        speeds = f"{t.prefill_rate:.0f}", f"{t.decode_rate:.1f}"
        grid.add_row(answer.engine, answer.dtype, *speeds, size(t.bytes_per_token), f"{share:.0%}")
    return grid


def decode_table(rows: Sequence[Row]) -> Table:
    """Tokens per second of each engine, half the quartile distance, its share of the roofline, and ours over
    each; ours is the first of a cell and type."""
    grid = table("cell", "engine", "tokens/s", "+-", "of roofline", "ours / it")
    ours: dict[tuple[object, str], Row] = {}
    for row in rows:
        if not any(row.dtype == kind for _, kind in ours):
            grid.add_section()
            grid.add_row(row.dtype)
        own = ours.setdefault((row.cell, row.dtype), row)
        cell = str(row.cell) if row is own else ""
        if row.timing.error:
            grid.add_row(cell, row.engine, "failed", "", "", "")
            continue
        spread = f"{(row.timing.q3 - row.timing.q1) / 2 / row.timing.median:.0%}"
        ratio = "" if row is own else f"{row.timing.median / own.timing.median:.2f}x"
        grid.add_row(
            cell, row.engine, f"{row.rate:.4g}", spread, f"{row.roof_s / row.timing.median:.0%}", ratio
        )
    return grid


def quality_table(found: Sequence[Quality]) -> Table:
    """How often each engine's best token is that of float32, and its perplexity."""
    grid = table("engine", "type", "tokens", "perplexity", "as float32", "+-")
    for one in found:
        if one.error:
            grid.add_row(one.engine, one.dtype, "no logits", "", "", "")
            continue
        share, error = f"{one.agreement:.2%}", f"{one.agreement_error:.2%}"
        grid.add_row(one.engine, one.dtype, f"{one.tokens:,}", f"{one.perplexity:.3f}", share, error)
    return grid


def beside_table(rows: Sequence[Beside]) -> Table:
    """Speed beside a busy core."""
    grid = table("beside a busy core", "ms a step alone", "ms beside it", "speed kept")
    for row in rows:
        alone, beside = row.alone.median * 1e3, row.beside.median * 1e3
        grid.add_row(row.engine, f"{alone:.1f}", f"{beside:.1f}", f"{row.kept:.0%}")
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


def one_token_table(rows: Sequence[OneToken]) -> Table:
    """Microseconds of one token's attention, its rates, and its share of the roofline with what that is."""
    grid = table("keys of", "context", "batch", "cache", "us", "GB/s", "10^9 op/s", "of roofline", "bound by")
    for row in rows:
        seconds = row.timing.median
        rates = (f"{row.read_bytes / seconds / 1e9:.1f}", f"{row.operations / seconds / 1e9:.0f}")
        where = (f"{row.kv_heads} of 16 heads", str(row.context), str(row.batch), row.stored)
        grid.add_row(*where, f"{seconds * 1e6:.0f}", *rates, f"{row.share:.0%}", row.bound)
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


def long_table(cells: Sequence[Growth]) -> Table:
    """Seconds and memory of training steps on one long row."""
    grid = table("training step", "tokens", "forward s", "with backward s", "peak memory")
    for cell in cells:
        figures = (f"{cell.forward_s:.3g}", f"{cell.both_s:.3g}", size(cell.peak_bytes))
        grid.add_row(
            cell.name, str(cell.tokens), *(("failed", cell.error[:60], "") if cell.error else figures)
        )
    return grid
