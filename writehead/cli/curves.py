"""What a position scheme does to the score of a query for keys at growing distances, by the built scheme."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.text import Text

from writehead.catalog import POSITIONS, build
from writehead.cli.picture import figure, save, wrapped
from writehead.core.positions import Positions
from writehead.positions.base import Scheme, has

LONGEST = 8192  # tokens
BARS = "▁▂▃▄▅▆▇█"


class Curve(NamedTuple):
    """A quantity at key distances 0, 1, ..."""

    label: str
    values: list[float]


def curves(spec: Mapping[str, Any], length: int, heads: int, head_dim: int) -> tuple[str, list[Curve]]:
    """What the scheme adds to, or does with, the score of the last of `length` tokens for each key before it.

    Args:
        spec: the row's name and arguments.
        length: tokens.
        heads, head_dim: of the attention that it serves.

    Returns:
        What is drawn, in words, and the curves; none for a scheme that changes nothing.

    Raises:
        ValueError: a length out of range, or a spec that cannot be built.
    """
    if not 2 <= length <= LONGEST:
        raise ValueError(f"a curve needs 2 to {LONGEST} tokens; got {length}")
    given = {"dim": heads * head_dim, "heads": heads, "head_dim": head_dim, "bidirectional": False}
    context = {key: value for key, value in given.items() if key not in spec}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        scheme: Scheme = build(POSITIONS, spec, **context)
        pos = Positions.range(1, 0, length)
        scheme.check_context(pos)
        return _curves(scheme, pos, heads, head_dim)


def _curves(scheme: Scheme, pos: Positions, heads: int, head_dim: int) -> tuple[str, list[Curve]]:
    if has(scheme, "bias"):
        added = scheme.bias(pos.index[:, -1:], pos.index, torch.float64)
        assert added is not None
        says = "added to the score of the last query, by distance of the key"
        return says, [Curve(f"head {h}", plane[0].flip(-1).tolist()) for h, plane in enumerate(added[0])]
    if has(scheme, "rotate"):
        ones = torch.ones(1, pos.index.shape[1], 1, head_dim, dtype=torch.float64)
        turned = scheme.rotate(ones, pos)[0, :, 0]
        says = "score of equal query and key, turned, over the score unturned, by distance of the key"
        return says, [Curve("score", (turned @ turned[-1] / head_dim).flip(0).tolist())]
    if has(scheme, "embed") or has(scheme, "infuse"):
        nothing = torch.zeros(1, pos.index.shape[1], heads * head_dim)
        places = scheme.embed(pos, torch.float32) if has(scheme, "embed") else scheme.infuse(nothing, pos)
        assert places is not None
        unit = torch.nn.functional.normalize(places[0].double(), dim=-1)
        says = "likeness (cosine) of the last token's position vector and others', by distance"
        return says, [Curve("cosine", (unit @ unit[-1]).flip(0).tolist())]
    return "changes nothing: tokens are told apart by what they may read only", []


def draw(found: list[Curve], width: int, ascii_only: bool) -> list[Text]:
    """The curves as bars of one scale, near keys left, each with its highest and lowest value."""
    lines = []
    low = min((min(curve.values) for curve in found), default=0.0)
    high = max((max(curve.values) for curve in found), default=0.0)
    for curve in found:
        step = -(-len(curve.values) // max(width - 30, 10))
        means = [sum(part) / len(part) for part in _parts(curve.values, step)]
        bars = "_.-=*#%@" if ascii_only else BARS
        span = (high - low) or 1.0
        line = Text(f"{curve.label:<8}")
        line.append("".join(bars[round(7 * (m - low) / span)] for m in means), "cyan")
        line.append(f"  {max(curve.values) + 0.0:.3g} .. {min(curve.values):.3g}")
        lines.append(line)
    return lines


def png(says: str, found: list[Curve], title: str) -> bytes:
    """The curves as a PNG file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    sheet = figure()(figsize=(8, 4.5), layout="constrained")
    axes = sheet.add_subplot()
    for curve in found:
        axes.plot(range(len(curve.values)), curve.values, label=curve.label)
    sheet.suptitle(wrapped(title, 8), fontsize=10)
    axes.set(xlabel="distance of the key in tokens", ylabel=says.partition(",")[0])
    if found:
        axes.legend()
    return save(sheet)


def _parts(values: list[float], step: int) -> list[list[float]]:
    return [values[i : i + step] for i in range(0, len(values), step)]
