"""Images as training data: read, split, batched, learned from, scored, drawn by the verbs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.small import assert_same, begun, log, train, values
from writehead.cli import app
from writehead.convert.load import load
from writehead.decode.images import draw_images
from writehead.evaluate.images import bits_per_dim, marginal_bits
from writehead.model.pixels import Frame
from writehead.train.images import Images, read_images, tokens_of

FRAME = Frame(3, 4, levels=4)
PIXELS = {"name": "categorical", "height": 3, "width": 4, "levels": 4}


def stripes(count: int) -> np.ndarray:
    """Images of equal rows: once a row is known, the others are."""
    row = np.random.default_rng(0).integers(0, 4, (count, 1, 4)) * 85
    return np.repeat(row, 3, 1).astype(np.uint8)


def plain(count: int) -> np.ndarray:
    """Images of one level each."""
    level = np.random.default_rng(2).integers(0, 4, (count, 1, 1)) * 85
    return np.broadcast_to(level, (count, 3, 4)).astype(np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    np.savez(path, x_train=plain(40), x_test=plain(9), labels=np.zeros(40, np.uint8))
    return path


def given(file: Path, **sections: Any) -> dict[str, Any]:
    run = values("", **sections)
    run["data"] = {"kind": "image", "train": [f"{file}:x_train"], "batch": 4, **sections.get("data", {})}
    mixer = {"name": "image_1d", "heads": 2, "block": 4, "memory": 8}
    run["model"] |= {"mixer": mixer, "position": {"name": "grid", "shape": [3, 4]}, "pixels": PIXELS}
    return run


def test_arrays_files_and_pictures_of_a_folder_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    images = stripes(4)
    np.save(tmp_path / "a.npy", images[:1])
    np.savez(tmp_path / "b.npz", images=images[1:3], names=np.array(["x"]))
    (tmp_path / "notes.txt").write_text("no image")
    Image.fromarray(images[3]).save(tmp_path / "c.png")
    found = read_images([str(tmp_path)], FRAME)
    assert found.shape == (4, 3, 4, 1)
    assert np.array_equal(found[..., 0], images)


def test_a_picture_in_colour_has_three_channels(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "c.png")
    assert np.array_equal(read_images([str(tmp_path / "c.png")], Frame(3, 4, 3))[0], colours)


REFUSED = [
    ("nowhere.npz:x", "there is no '.*; give FILE.npz:NAME, FILE.npy, or a folder of images"),
    ("images.npz", r"holds 2 arrays of images \(x_train, x_test\); name one: images.npz:NAME"),
    ("images.npz:y", r"has no array 'y' \(it has x_train, x_test, labels\)"),
    ("images.npz:labels", r"holds uint8 of shape \(40,\); expected uint8 of shape \(N, 3, 4, 1\)"),
    ("floats.npy", r"holds float64 of shape \(2, 3, 4, 1\); expected uint8"),
    ("text.npz", "text.npz: is no array of NumPy"),
    ("objects.npy", "objects.npy: is no array of NumPy: Object arrays cannot be loaded"),
    ("text.png", "text.png: is no picture"),
    ("empty", "empty holds no images"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_what_holds_no_such_images_is_refused(file: Path, name: str, message: str) -> None:
    folder = file.parent
    (folder / "empty").mkdir()
    for text in ("text.npz", "text.png"):
        (folder / text).write_text("text")
    np.save(folder / "floats.npy", np.zeros((2, 3, 4)))
    np.save(folder / "objects.npy", np.array([{}], object))
    with pytest.raises(ValueError, match=message):
        read_images([str(folder / name)], FRAME)


def test_a_batch_predicts_every_position_from_those_before_and_each_image_comes_once() -> None:
    tokens = tokens_of(stripes(10)[..., None], FRAME)
    one = Images(tokens, FRAME, 4, None)
    assert one.count == 3
    parts = [one(step) for step in range(3)]
    assert np.array_equal(torch.cat([part.target for part in parts]).numpy(), tokens)
    for part in parts:
        assert bool((part.tokens[:, 0] == 4).all())
        assert torch.equal(part.tokens[:, 1:], part.target[:, :-1])
    shuffled = Images(tokens, FRAME, 5, seed=3)
    seen = torch.cat([shuffled(0).target, shuffled(1).target]).numpy()
    assert sorted(map(bytes, seen.astype(np.uint8))) == sorted(map(bytes, tokens))
    assert not np.array_equal(seen, tokens)


def test_the_marginal_counts_every_level_once_more() -> None:
    frame = Frame(1, 2, levels=4)
    counted = np.array([[0, 3], [0, 1]], np.uint8)
    scored = np.array([[0, 2]], np.uint8)
    assert marginal_bits(counted, scored, frame) == pytest.approx((-math.log2(3 / 6) - math.log2(1 / 6)) / 2)


def test_a_run_learns_more_than_the_marginal_and_its_score_is_the_loss(file: Path, tmp_path: Path) -> None:
    run = given(file, optim={"lr": 0.02, "warmup": 2}, loop={"steps": 60}, report={"eval_every": 0})
    run["data"]["valid"] = [f"{file}:x_test"]
    run["report"]["eval_batches"] = 9
    found = train(run, tmp_path / "run")
    loaded = load(found)
    assert loaded.tokenizer is None
    score = bits_per_dim(loaded.model, (f"{file}:x_test",), counted=(f"{file}:x_train",), batch=4)
    assert score.baseline == pytest.approx(2, abs=0.3)  # four levels, drawn evenly
    assert score.per_dim < 0.5 * score.baseline
    assert (score.images, score.dims, score.levels) == (9, 12, 4)
    last = [line for line in log(tmp_path / "run") if "eval/bits_per_dim" in line][-1]
    assert last["eval/bits_per_dim"] == pytest.approx(score.per_dim, rel=1e-5)
    assert "eval/perplexity" not in last


def test_a_run_goes_on_with_the_bits_of_one_that_was_not_stopped(file: Path, tmp_path: Path) -> None:
    constant = {"schedule": "constant", "warmup": 0}  # a cosine would know another end
    train(given(file, optim=constant), tmp_path / "whole")
    train(given(file, optim=constant, loop={"steps": 4}), tmp_path / "parts")
    train(given(file, optim=constant), tmp_path / "parts", resume="auto")
    assert_same(tmp_path / "whole" / "latest", tmp_path / "parts" / "latest")


def test_the_verbs_train_score_and_draw(file: Path, tmp_path: Path, capsys: Any) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given(file)))
    out = str(tmp_path / "out")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app([*arguments, "--threads", "1"], prog_name="writehead")
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    assert run("train", str(tmp_path / "run.yaml"), "--out", out)[0] == 0
    code, said, _ = run(
        "evaluate", f"{out}/latest", f"{file}:x_test", "--baseline", f"{file}:x_train", "--json"
    )
    assert code == 0
    values = json.loads(said)
    right = bits_per_dim(load(f"{out}/latest").model, (f"{file}:x_test",))
    assert values["bits_per_dim"] == pytest.approx(right.per_dim, rel=1e-6)
    assert values["baseline_bits_per_dim"] > 1.5
    picture = tmp_path / "grid.png"
    code, said, err = run(
        "sample", f"{out}/latest", "--out", str(picture), "--count", "6", "--columns", "3", "--seed", "1"
    )
    assert (code, said) == (0, f"wrote {picture}\n")
    assert "decode 66 positions" in err
    drawn, _ = draw_images(load(f"{out}/latest").model, 6, seed=1)
    shown = np.asarray(Image.open(picture))
    assert shown.shape == (2 * (6 + 2) + 2, 3 * (8 + 2) + 2)
    assert np.array_equal(shown[2:8:2, 2:10:2], drawn[0, ..., 0])
    assert run("sample", f"{out}/latest", "--out", "grid.jpg")[0] == 2
    assert run("evaluate", f"{out}/latest", f"{file}:x_test", "--window", "8")[0] == 2


@pytest.mark.slow
def test_images_in_colour_are_learned_scored_and_drawn(tmp_path: Path, capsys: Any) -> None:
    tint = np.random.default_rng(3).integers(0, 4, (30, 1, 1, 1)) * 85
    colours = np.broadcast_to(np.concatenate([tint, 255 - tint, tint], 3), (30, 3, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=colours[:24], x_test=colours[24:])
    run = given(tmp_path / "colour.npz", optim={"lr": 0.02, "warmup": 2}, loop={"steps": 60})
    run["report"]["eval_every"] = 0
    run["model"] |= {
        "mixer": {"name": "image_1d", "heads": 2, "block": 12, "memory": 12},
        "position": {"name": "grid", "shape": [3, 4, 3]},
        "pixels": {**PIXELS, "channels": 3},
    }
    found = load(train(run, tmp_path / "run"))
    files = [(f"{tmp_path / 'colour.npz'}:{name}",) for name in ("x_test", "x_train")]
    score = bits_per_dim(found.model, files[0], counted=files[1], batch=4)
    assert score.dims == 36
    assert score.baseline is not None
    assert score.per_dim < 0.5 * score.baseline
    picture = tmp_path / "drawn.png"
    with pytest.raises(SystemExit):
        app(["sample", str(tmp_path / "run"), "--out", str(picture), "--count", "2", "--seed", "4"])
    drawn, _ = draw_images(found.model, 2, seed=4)
    shown = np.asarray(Image.open(picture))
    assert np.array_equal(shown[2:8:2, 2:10:2], drawn[0])
    capsys.readouterr()
    red, green, blue = drawn.float().unbind(-1)
    assert (red - (255 - green)).abs().mean() < 40, "a drawn pixel's channels belong together"
    assert (red - blue).abs().mean() < 40


CONFIGS = [
    ({"data": {"length": 8}}, "data.length is not for images, whose size and levels are model.pixels"),
    ({"data": {"fields": ["image"]}}, "data.fields is not for images"),
    ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing is not for images"),
    ({"loop": {"carry_state": True}}, "loop.carry_state is for data.kind='text'"),
    ({"data": {"kind": "text"}}, "data.kind='image' and model.pixels need each other"),
    ({"data": {"holdout": 0.99}}, "40 images are too few to hold 99% out"),
]


@pytest.mark.parametrize(("sections", "message"), CONFIGS)
def test_runs_of_images_that_cannot_be_are_refused(
    file: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), begun(given(file, **sections), tmp_path / "run"):
        pass
