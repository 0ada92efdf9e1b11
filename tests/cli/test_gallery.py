"""The gallery and pictures on the image: sets of the papers, pixel by pixel, and a page that is up to date."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import patterns as paper
from typer.testing import CliRunner

from writehead.cli import app, png
from writehead.cli.gallery import FIGURES, Panel, draw, seen, text, write
from writehead.cli.image_grid import COLOURS, Grid, pixels
from writehead.core.pattern import Image2D

DOCS = Path(__file__).parents[2] / "docs"
run = CliRunner().invoke


def test_page_and_pictures_in_docs_are_up_to_date(tmp_path: Path) -> None:
    command = "run `writehead systems --gallery docs/patterns.md`"
    for path in write(tmp_path / "patterns.md"):
        kept = DOCS / path.relative_to(tmp_path)
        if path.suffix == ".md":
            assert kept.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), command
        else:  # deflated bytes may differ from one zlib to another, pixels not
            assert np.array_equal(np.asarray(Image.open(kept)), np.asarray(Image.open(path))), command
    assert text("patterns").count("](patterns/") == len(FIGURES)
    assert {p.stem for p in (DOCS / "patterns").iterdir()} == {figure.name for figure in FIGURES}


def sets(panel: Panel, length: int) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in seen(panel, length)[0]]


def test_panels_are_the_papers_sets() -> None:
    by = {(figure.name, panel.caption): panel for figure in FIGURES for panel in figure.panels}
    near, far = zip(*[paper.strided(i, 8) for i in range(64)], strict=True)
    both = [a | b for a, b in zip(near, far, strict=True)]
    assert sets(by["sparse_transformer", "strided, l = 8"], 64) == both
    assert sets(by["sparse_transformer", "strided, far"], 64) == list(far)
    fixed = [set.union(*paper.fixed(i, 8, 1)) for i in range(64)]
    assert sets(by["sparse_transformer", "fixed, l = 8, c = 1"], 64) == fixed
    other = [set.union(*paper.fixed(i, 8, 1, 1)) for i in range(64)]
    assert sets(by["sparse_transformer", "fixed, part 1"], 64) == other
    flat = paper.image_2d(8, 12, (2, 3), (2, 3))
    assert sets(by["image_transformer", "2D, blocks of 2 x 3, margin 2 and 3"], 96) == flat
    for shift, caption in enumerate(("3 blocks, (1, 2, 3)", "(2, 3, 1)", "(3, 1, 2)")):
        assert sets(by["block_bert", caption], 24) == [paper.block_bert(i, 24, 3, shift) for i in range(24)]
    dilated = [paper.longformer(i, 24, 6, 2, set()) for i in range(24)]
    assert sets(by["longformer", "dilated window"], 24) == dilated


def test_a_query_and_its_keys_lie_on_the_image_in_the_order_of_blocks() -> None:
    keys = torch.zeros(24, dtype=torch.bool)
    keys[[0, 7]] = True
    assert Grid(6).cells(keys, 13).tolist() == [
        [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0], [0] * 6,
    ]  # fmt: skip
    blocks = Grid(6, Image2D(6, 2, 3, 0, 0))
    assert blocks.cells(keys, 13).tolist() == [
        [1, 0, 0, 0, 1, 0], [0] * 6, [0, 2, 0, 0, 0, 0], [0] * 6,
    ]  # fmt: skip


def test_a_cell_is_a_square_of_its_colour_with_a_line_behind_it() -> None:
    image = pixels(torch.tensor([[0, 1, 2]]), 4)
    assert image.shape == (4, 12, 3)
    for code in range(3):
        assert bool((image[:3, 4 * code : 4 * code + 3] == COLOURS[code]).all())
    assert bool((image[3] == 255).all())
    assert bool((image[:, 3::4] == 255).all())


def test_a_png_of_ours_opens_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for channels in (1, 3):
        image = torch.randint(0, 256, (5, 7, channels), dtype=torch.uint8)
        path = tmp_path / f"{channels}.png"
        path.write_bytes(png.encode(image))
        assert np.array_equal(np.asarray(Image.open(path)).reshape(5, 7, channels), image.numpy())


def test_a_figure_has_an_image_over_each_square() -> None:
    figure = next(figure for figure in FIGURES if figure.name == "axial")
    picture = draw(figure)
    orange = (picture == COLOURS[2]).all(-1)
    assert int(orange.sum()) == 4 * 17 * 17  # a query a panel, 18 pixels wide with its line
    assert int(orange[72:89, 72:89].sum()) == 17 * 17  # query 36 is row 4, column 4


def test_show_draws_a_query_on_the_image() -> None:
    done = run(app, ["show", "axial_causal", "--set", "image_width=6", "--context", "24", "--query", "14"])
    assert done.exit_code == 0, done.output
    assert "on the image: Q is query 14, # the keys that it reads" in done.stdout
    assert "\n. . # . . .\n. . # . . .\n. . Q . . .\n. . . . . .\n" in done.stdout
    done = run(
        app,
        ["show", "sparse_strided", "--set", "stride=6", "--context", "24", "--image", "6", "--query", "15"],
    )
    assert "\n. . . # . .\n. . . # # #\n# # # Q . .\n. . . . . .\n" in done.stdout
    assert "on the image" not in run(app, ["show", "mqa", "--context", "8"]).stdout


REFUSED = [
    (["mqa", "--query", "3"], "--query is for images: give --image WIDTH too"),
    (["axial", "--image", "8"], "--image 8: this mixer's images are 32 wide"),
    (["axial", "--query", "48"], "--query 48 is beyond the picture's 48 tokens"),
    (["dense", "--image", "8"], "--image: dense has no picture of queries and keys"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_images_that_cannot_be_drawn_are_refused(arguments: list[str], message: str) -> None:
    done = run(app, ["show", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_a_gallery_needs_a_page(tmp_path: Path) -> None:
    done = run(app, ["systems", "--gallery", str(tmp_path / "page.txt")])
    assert done.exit_code == 1
    assert "must end in .md" in done.stderr
