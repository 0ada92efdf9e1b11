"""The gallery of patterns: docs/patterns.md and its pictures, out of mixers that are built for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from writehead.catalog import MIXERS, build
from writehead.cli import png
from writehead.cli.image_grid import Grid, grid_of, pixels
from writehead.cli.output import write_whole

DIM = 8  # of a head
GAP = 10  # pixels between panels


class Panel(NamedTuple):
    """A mixer, and one of its query heads."""

    caption: str
    spec: Mapping[str, Any]
    head: int = 0


class Figure(NamedTuple):
    """Panels side by side.

    Attributes:
        name: of the file.
        title: the system, and the figure of its paper that this is.
        length: tokens.
        panels: what is drawn.
        width: tokens of an image row, where one query is drawn on the image too.
        query: the one.
    """

    name: str
    title: str
    length: int
    panels: tuple[Panel, ...]
    width: int | None = None
    query: int = 0


def _window(window: int, after: int = 0) -> dict[str, Any]:
    return {"name": "mha", "heads": 1, "pattern": {"name": "window", "window": window, "after": after}}


SPARSE = {"heads": 2, "stride": 8}
BLOCKS = {"name": "blocks", "size": 4}
RANDOM = {"name": "random", "size": 4, "count": 1}
FIGURES = (
    Figure(
        "sparse_transformer",
        "Sparse Transformer (arXiv:1904.10509, figure 3): full, strided, fixed",
        64,
        (
            Panel("full", {"name": "mha", "heads": 1}),
            Panel("strided, l = 8", {"name": "sparse_strided", **SPARSE}),
            Panel("fixed, l = 8, c = 1", {"name": "sparse_fixed", **SPARSE, "columns": 1}),
            Panel("strided, near", {"name": "sparse_strided", **SPARSE, "use": "near"}),
            Panel("strided, far", {"name": "sparse_strided", **SPARSE, "use": "far"}),
            Panel("fixed, part 1", {"name": "sparse_fixed", **SPARSE, "columns": 1, "parts": 2}, 1),
        ),
        8,
        36,
    ),
    Figure(
        "image_transformer",
        "Image Transformer (arXiv:1802.05751, figure 2): local in one and in two dimensions",
        96,
        (
            Panel("1D, l_q = 6, l_m = 24", {"name": "image_1d", "heads": 1, "block": 6, "memory": 24}),
            Panel(
                "2D, blocks of 2 x 3, margin 2 and 3",
                {"name": "image_2d", "heads": 1, "image_width": 12, "patch": [2, 3], "margin": [2, 3]},
            ),
        ),
        12,
        58,
    ),
    Figure(
        "axial",
        "Axial Transformer (arXiv:1912.12180, figure 1): columns and rows, unmasked and masked",
        64,
        tuple(
            Panel(f"{line}, {said}", {"name": name, "heads": 1, "axis": axis, "image_width": 8})
            for name, said in (("axial", "unmasked"), ("axial_causal", "masked"))
            for axis, line in enumerate(("column", "row"))
        ),
        8,
        36,
    ),
    Figure(
        "block_bert",
        "BlockBERT (arXiv:1911.02972, figure 2): permutations of 2 and of 3 blocks",
        24,
        (
            Panel("2 blocks, (1, 2)", {"name": "block_bert", "heads": 2, "shifts": [0, 1]}, 0),
            Panel("2 blocks, (2, 1)", {"name": "block_bert", "heads": 2, "shifts": [0, 1]}, 1),
            *(
                Panel(said, {"name": "block_bert", "heads": 3, "blocks": 3, "shifts": [0, 1, 2]}, shift)
                for shift, said in enumerate(("3 blocks, (1, 2, 3)", "(2, 3, 1)", "(3, 1, 2)"))
            ),
        ),
    ),
    Figure(
        "longformer",
        "Longformer (arXiv:2004.05150, figure 2): full, window, dilated window, window and global",
        24,
        (
            Panel("full", {"name": "bidirectional", "heads": 1}),
            Panel("window", {"name": "longformer", "heads": 1, "window": 6, "tokens": 0}),
            Panel(
                "dilated window",
                {"name": "longformer", "heads": 1, "window": 6, "tokens": 0, "dilations": [2]},
            ),
            Panel("window and global", {"name": "longformer", "heads": 1, "window": 6, "tokens": 2}),
            Panel("looking back", {"name": "longformer_causal", "heads": 1, "window": 6, "tokens": 2}),
        ),
    ),
    Figure(
        "big_bird",
        "Big Bird (arXiv:2007.14062, figure 1): random, window, both with global blocks",
        48,
        (
            Panel("random blocks", {"name": "mha", "heads": 1, "pattern": {**RANDOM, "blocks_drawn": 12}}),
            Panel(
                "window of blocks",
                {"name": "mha", "heads": 1, "pattern": {**BLOCKS, "before": 1, "after": 1}},
            ),
            Panel("Big Bird", {"name": "big_bird", "heads": 1, "block": 4, "random": 1}),
            Panel("looking back", {"name": "big_bird_causal", "heads": 1, "block": 4, "random": 1}),
        ),
    ),
    Figure(
        "windows",
        "Windows: local attention, and a window behind attention sinks (arXiv:2309.17453, figure 1)",
        24,
        (
            Panel("window of 6", _window(6)),
            Panel("on both sides", _window(4, 3)),
            Panel(
                "sinks and window",
                {"name": "sink_mqa", "heads": 1, "pattern": {
                    "name": "and", "a": {"name": "causal"}, "b": {"name": "or",
                    "a": {"name": "window", "window": 6}, "b": {"name": "leading", "count": 2}}}},
            ),
        ),
    ),
)  # fmt: skip


def write(page: Path) -> list[Path]:
    """Write the page and, in a folder of its name beside it, a picture a figure.

    Raises:
        ValueError: the page is no .md file.
    """
    if page.suffix != ".md":
        raise ValueError(f"{page} must end in .md: pictures go into a folder of the same name")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    written = [folder / f"{figure.name}.png" for figure in FIGURES]
    for path, figure in zip(written, FIGURES, strict=True):
        write_whole(path, png.encode(draw(figure)))
    write_whole(page, text(folder.name).encode())
    return [page, *written]


def text(folder: str) -> str:
    """The page, with pictures in `folder`."""
    parts = [
        "# Patterns",
        "",
        "Made by `writehead systems --gallery docs/patterns.md` from the patterns that built mixers state; a",
        "test keeps page and pictures up to date. `writehead show NAME --png FILE` draws any other size, and",
        "compares it with what gradients say.",
        "",
        "Each square has a row for a query and a column for a key. Above it, where there is an image, the",
        "keys (blue) of one query (orange) as pixels.",
    ]
    for figure in FIGURES:
        captions = "; ".join(panel.caption for panel in figure.panels)
        parts += ["", f"## {figure.title}", "", f"From left to right: {captions}.", ""]
        parts += [f"![{figure.title}]({folder}/{figure.name}.png)"]
    return "\n".join(parts) + "\n"


def draw(figure: Figure) -> Tensor:
    """The picture of a figure: uint8 (height, width, 3)."""
    panels = []
    for panel in figure.panels:
        mask, grid = seen(panel, figure.length)
        parts = [pixels(mask.long(), max(2, 144 // figure.length))]
        if figure.width is not None:
            grid = grid or Grid(figure.width)
            parts.insert(0, pixels(grid.cells(mask[figure.query], figure.query), 144 // figure.width))
        width = max(part.shape[1] for part in parts)
        panels.append(torch.cat([_padded(part, part.shape[0] + GAP, width) for part in parts]))
    height = max(panel.shape[0] for panel in panels)
    return torch.cat([_padded(panel, height, panel.shape[1] + GAP) for panel in panels], 1)


def seen(panel: Panel, length: int) -> tuple[Tensor, Grid | None]:
    """Which keys each of `length` queries reads (T, S), as the built mixer states, and its image."""
    heads = int(panel.spec["heads"])
    with torch.random.fork_rng(devices=[]):
        mixer = build(MIXERS, panel.spec, dim=DIM * heads, position=None)
    pattern = mixer.pattern_for(length).head(panel.head)
    index = torch.arange(length)
    return pattern.allows(index[:, None], index), grid_of(mixer, pattern)


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    out = torch.full((height, width, 3), 255, dtype=torch.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    return out
