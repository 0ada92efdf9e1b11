"""`writehead plan --train` as a user sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from writehead.cli import app, plan_training

CONFIG = {"vocab": 64, "dim": 32, "depth": 1, "mixer": {"name": "mqa", "heads": 2}}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["plan", *args])


@pytest.mark.slow
def test_every_way_to_train_has_its_peak_and_what_fits(config: str) -> None:
    result = run(config, "--train", "--budget", "4MB", "--lengths", "16,64", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["budget"] == 4_000_000
    assert list(found["plans"]) == ["plain", "checkpointed", "reversible", "reversible chunked"]
    for one in found["plans"].values():
        assert one["fixed"] < one["most"]
        assert one["batches"]["16"] > one["batches"]["64"] > 0
    plans = found["plans"]
    assert plans["reversible chunked"]["batches"]["64"] > plans["plain"]["batches"]["64"]


@pytest.mark.slow
def test_without_lengths_the_longest_row_is_told_too(config: str) -> None:
    result = run(config, "--train", "--budget", "1MB", "--context", "32")
    assert result.exit_code == 0, result.output
    assert "rows of 32 in 1 MB" in result.stdout
    assert "tokens of 1 row in 1 MB" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "12GB"], "belong to training: add --train"),
        (["--train", "--lengths", "64"], "add --budget"),
        (["--train", "--budget", "12 cows"], "such as 12GB, 16GiB or 500MB; got '12 cows'"),
        (["--train", "--budget", "1GB", "--lengths", "64,x"], "such as 64,128,256; got '64,x'"),
        (["--train", "--bandwidth", "10"], "--bandwidth belong to decoding"),
    ],
)
def test_options_that_do_not_fit_are_refused(config: str, args: list[str], message: str) -> None:
    result = run(config, *args)
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * 10**9), ("1.5GiB", 3 * 2**29), ("500", 500), ("8 mb", 8 * 10**6)]
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, size: int) -> None:
    assert plan_training.bytes_of(text) == size
