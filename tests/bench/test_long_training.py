"""Training steps on one long row: every layer runs, and what is asked together must go together."""

import pytest
import torch
from typer.testing import CliRunner

from writehead.bench.long_training import LAYERS, layer, model, ratios
from writehead.bench.scaling import Growth
from writehead.cli.bench import command

PACKAGES = {"local-attention": "local_attention", "transformers' Longformer": "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_trains_on_a_row(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    forward, both, peak = layer(name, 512, 2, 8, torch.get_num_threads(), 1)
    assert 0 < forward < both
    assert peak >= 0


def test_a_whole_model_trains_on_a_row():
    forward, both, _ = model(1, 300, torch.get_num_threads(), depth=1, dim=16)
    assert 0 < forward < both


def test_each_layer_is_compared_with_ours_of_its_kind_and_failed_ones_with_nothing():
    cells = [
        Growth("window", 512, 1.0, 2.0), Growth("dense SDPA", 512, 4.0, 8.0), Growth("longformer", 512, 1.0, 4.0),
        Growth("dense SDPA, both sides", 512, 9.0, 20.0), Growth("local-attention", 512, error="not installed"),
    ]  # fmt: skip
    assert ratios(cells) == {
        "window": {"dense SDPA": 4.0},
        "longformer": {"dense SDPA, both sides": 5.0},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "--model"], "--peers and --model are two measurements: ask for one"),
        (["--peers", "--tokens", "512", "--tokens", "1024"], "measure at one length; got --tokens"),
        (["--peers", "--only", "windw"], "unknown layer 'windw'; did you mean 'window'"),
        (["--model", "--only", "window"], "--only chooses among layers"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    done = CliRunner().invoke(command, ["scaling", *arguments])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


@pytest.mark.slow
def test_the_command_writes_its_record_under_the_name_asked_for(tmp_path):
    arguments = ["--peers", "--only", "window", "--only", "dense SDPA", "--tokens", "512", "--heads", "2"]
    done = CliRunner().invoke(
        command, ["scaling", *arguments, "--rounds", "1", "--name", "here", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "dense SDPA" in done.output
    assert "times_ours" in (tmp_path / "here.json").read_text()
