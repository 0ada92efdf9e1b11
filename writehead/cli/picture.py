"""Pictures of who sees whom, by what a built mixer does: a key is seen where an output's gradient reaches it.

The pattern that a mixer states, where it states one, is compared with the picture pair by pair.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from writehead.catalog import MIXERS, build
from writehead.cli.image_grid import Grid, grid_of, pixels
from writehead.core.positions import Positions

LONGEST = 512  # tokens
PIECE = 64  # queries that are probed in one call, each in a row of its own
WIDTH = 8  # of each head
PANELS = 16  # of a PNG
NOTHING = 1e-13  # of the largest gradient; what is not read has exactly none


@dataclass(frozen=True)
class Picture:
    """What the outputs of a mixer depend on.

    Attributes:
        seen: (H or 1, T, S) bool; one plane for each head that can be told apart, else one for all.
        stated: what the mixer's pattern says, in the same shape, or None.
        pattern: the pattern in words.
        grid: the image that the tokens are, if there is one.
    """

    seen: Tensor
    stated: Tensor | None
    pattern: str
    grid: Grid | None = None

    @property
    def wrong(self) -> int:
        """Pairs in which mixer and pattern differ."""
        return 0 if self.stated is None else int((self.seen != self.stated).sum())

    def planes(self) -> list[tuple[str, Tensor]]:
        """The different planes with the heads that share them."""
        groups: dict[bytes, list[int]] = {}
        for head, plane in enumerate(self.seen):
            groups.setdefault(plane.numpy().tobytes(), []).append(head)
        if len(groups) == 1:
            return [("all heads" if len(self.seen) > 1 else "", self.seen[0])]
        return [(f"heads {_runs(heads)}", self.seen[heads[0]]) for heads in groups.values()]


def probe(spec: Mapping[str, Any], length: int, dim: int | None = None) -> Picture:
    """Build a mixer of the catalog small, in float64, and see which tokens reach which outputs.

    Args:
        spec: the row's name and arguments.
        length: tokens T, of the source too if the mixer reads one.
        dim: width X; default 8 a head.

    Raises:
        ValueError: a length out of range, or a spec that cannot be built.
    """
    if not 1 <= length <= LONGEST:
        raise ValueError(f"a picture holds 1 to {LONGEST} tokens; got {length}")
    heads = spec.get("heads", 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = dim or WIDTH * heads
        return look(build(MIXERS, spec, dim=width, position=None), length, width, heads)


def look(mixer: nn.Module, length: int, dim: int, heads: int = 1) -> Picture:
    """The picture of a built mixer of width `dim`, which is changed: to float64, its parameters disturbed."""
    mixer = mixer.double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():  # a zero would hide what it multiplies
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(length, dim, dtype=torch.float64)
    planes = torch.cat([_reach(mixer, x, rows, heads) for rows in torch.arange(length).split(PIECE)], 1)
    by_length: Any = getattr(mixer, "pattern_for", None)
    pattern = getattr(mixer, "pattern", None) if by_length is None else by_length(length)
    if pattern is None or hasattr(mixer, "remember"):
        return Picture(planes, None, "")
    index = Positions.range(1, 0, length).index
    stated = pattern.mask(index, index)[0].expand(len(planes), -1, -1)
    # a query that weighs two keys against each other depends on its own token, whether it reads it or not
    weighs = stated.sum(-1, keepdim=True) > 1
    stated = stated | (weighs & torch.eye(length, dtype=torch.bool))
    return Picture(planes, stated, str(pattern), grid_of(mixer, pattern))


def _reach(mixer: nn.Module, x: Tensor, queries: Tensor, heads: int) -> Tensor:
    """(H or 1, queries, S): row i of the batch asks for the gradient of output queries[i]."""
    rows = x.expand(len(queries), -1, -1).clone().requires_grad_()
    pos = Positions.range(len(queries), 0, len(x))
    y = _heads(mixer, rows, pos, heads)
    asked = y[torch.arange(len(queries)), queries]  # (queries, H or 1, width)
    asked = asked * torch.randn_like(asked[:1])
    found = []
    for head in range(asked.shape[1]):
        (gradient,) = torch.autograd.grad(asked[:, head].sum(), rows, retain_graph=True)
        found.append(gradient.abs().amax(-1))
    size = torch.stack(found)
    return size > NOTHING * size.max()


def _heads(mixer: Any, x: Tensor, pos: Positions, heads: int) -> Tensor:
    """The output (B, T, H, D) before heads are mixed, or (B, T, 1, X) where they cannot be told apart."""
    inputs: list[Tensor] = []
    out = getattr(mixer, "out", None)
    hook = None
    if isinstance(out, nn.Linear) and out.in_features % heads == 0:
        hook = out.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    if hasattr(mixer, "remember"):
        own = torch.randn(x.shape, dtype=x.dtype)
        y, _, _ = mixer(own, pos, mixer.remember(x, pos))
    elif hasattr(mixer, "init_state") and (getattr(mixer, "pattern", None) is None or mixer.pattern.causal):
        y, _, _ = mixer(x, pos)
    else:
        y, _ = mixer.encode(x, pos)
    if hook is not None:
        hook.remove()
        if len(inputs) == 1 and inputs[0].shape[:2] == x.shape[:2]:
            return torch.unflatten(inputs[0], -1, (heads, -1))
    assert isinstance(y, Tensor)
    return y[:, :, None]


def draw(picture: Picture, width: int, ascii_only: bool) -> list[Text]:
    """The picture as lines of text: queries downwards, keys across; x marks what contradicts the pattern.

    Args:
        picture: from `probe`.
        width: columns at most; a longer picture is reduced, a cell then stands for several tokens.
        ascii_only: use # and . instead of block characters.
    """
    wrong = None if picture.stated is None else (picture.seen != picture.stated).any(0)
    lines: list[Text] = []
    for title, plane in picture.planes():
        step = -(-plane.shape[1] // max(width, 8))
        cells = _reduce(plane, step)
        bad = torch.zeros_like(cells) if wrong is None else _reduce(wrong, step)
        note = f" (a cell is {step} x {step} tokens)" if step > 1 else ""
        if title or note:
            lines.append(Text((title + note).strip()))
        lines += _plain(cells, bad) if ascii_only else _blocks(cells, bad)
    return lines


def _plain(cells: Tensor, bad: Tensor) -> list[Text]:
    codes = (cells.int() + 2 * bad.int()).clamp_max(2).tolist()
    return [Text("".join(".#x"[code] for code in row)) for row in codes]


def _blocks(cells: Tensor, bad: Tensor) -> list[Text]:
    """Two rows of cells a line, as upper and lower halves of characters."""
    if len(cells) % 2:
        cells, bad = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (cells, bad))
    lines = []
    for t in range(0, len(cells), 2):
        off = (bad[t] | bad[t + 1]).tolist()
        halves = (2 * cells[t].int() + cells[t + 1].int()).tolist()
        line = Text("".join("x" if o else " ▄▀█"[h] for o, h in zip(off, halves, strict=True)), "cyan")
        line.highlight_regex("x+", "red")
        lines.append(line)
    return lines


def _reduce(cells: Tensor, step: int) -> Tensor:
    """A cell of the smaller picture is set if any of its step x step cells is."""
    if step == 1:
        return cells
    return nn.functional.max_pool2d(cells[None].float(), step, ceil_mode=True)[0].bool()


def png(picture: Picture, title: str, query: int = 0) -> bytes:
    """The picture as a PNG file: one panel for each group of heads that see alike; of images, another one
    with the keys of `query` as pixels.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure_class = figure()
    planes = picture.planes()
    if len(planes) > PANELS:
        title += f" (the first {PANELS} of {len(planes)} different pictures)"
    planes = planes[:PANELS]
    columns = min(4, len(planes))
    rows = -(-len(planes) // columns) * (1 if picture.grid is None else 2)
    size = (max(6.0, 4.2 * columns), 4.4 * rows + 0.6)
    sheet = figure_class(figsize=size, layout="constrained")
    sheet.suptitle(wrapped(title, size[0]), fontsize=10)
    wrong = torch.zeros(picture.seen.shape[1:], dtype=torch.bool)
    if picture.stated is not None:
        wrong = (picture.seen != picture.stated).any(0)
    for place, (name, plane) in enumerate(planes):
        axes = sheet.add_subplot(rows, columns, place + 1)
        colours = torch.tensor([[0.95, 0.95, 0.95], [0.13, 0.33, 0.60]])[plane.long()]
        colours[wrong] = torch.tensor([0.85, 0.15, 0.15])
        axes.imshow(colours.numpy(), interpolation="nearest")
        axes.set_xlabel("key: position of the token that is read")
        axes.set_ylabel("query: position of the token that reads")
        axes.set_title(name, fontsize=10)
    for place, (name, plane) in enumerate(planes if picture.grid is not None else [], rows // 2 * columns):
        assert picture.grid is not None
        axes = sheet.add_subplot(rows, columns, place + 1)
        axes.imshow(pixels(picture.grid.cells(plane[query], query), 1).numpy(), interpolation="nearest")
        axes.set_title(f"{name} the keys of query {query} as pixels".strip(), fontsize=10)
    return save(sheet)


def figure() -> Any:
    """matplotlib's Figure.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a PNG needs matplotlib: pip install 'writehead[plot]'") from None
    return Figure


def wrapped(title: str, inches: float) -> str:
    """A title in lines that fit a figure of that width."""
    return "\n".join(line for part in title.splitlines() for line in textwrap.wrap(part, int(13 * inches)))


def save(sheet: Any) -> bytes:
    """The bytes of a figure as PNG."""
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _runs(heads: Sequence[int]) -> str:
    """0-2, 5."""
    parts: list[str] = []
    start = previous = heads[0]
    for head in [*heads[1:], -1]:
        if head != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = head
        previous = head
    return ", ".join(parts)
