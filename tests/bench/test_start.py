"""`bench start`: both ways to a first token are measured, whole and in parts."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from writehead.bench.start import measure
from writehead.cli.bench import command
from writehead.config import ModelConfig
from writehead.convert.load import save
from writehead.convert.packed import save_packed
from writehead.convert.tokenizer import Tokenizer
from writehead.model.decoder import Decoder
from writehead.native.library import library
from writehead.native.weights import pack_model

pytestmark = pytest.mark.skipif(library()[0] is None, reason=f"no native engine here: {library()[1]}")


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    mixer = {"name": "mqa", "heads": 2}
    return Decoder(
        ModelConfig(vocab=259, dim=16, depth=1, mixer=mixer, feedforward={"name": "dense", "hidden": 16})
    )


@pytest.mark.slow
def test_both_ways_are_measured_and_their_parts_add_up_to_the_command(model: Decoder, tmp_path: Path) -> None:
    save(model, tmp_path / "model", tokenizer=Tokenizer.bytes())
    arguments = ["start", "--model", str(tmp_path / "model"), "--prompt", "abc", "--rounds", "1"]
    done = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "the command's first token" in done.output
    record = json.loads((tmp_path / "start.json").read_text())
    solo, both = record["results"]
    assert (solo["way"], both["way"], record["extra"]["prompt"]) == ("solo", "torch", "abc")
    assert "PyTorch" not in solo["stages_s"]
    assert 0 < both["stages_s"]["PyTorch"] < both["median_s"]
    for one in (solo, both):
        assert (one["n"], one["error"]) == (1, "")
        assert sum(one["stages_s"].values()) == pytest.approx(one["median_s"])
        assert all(seconds > 0 for name, seconds in one["stages_s"].items() if name != "the command line")


def test_a_command_that_fails_is_told_in_its_own_words(model: Decoder, tmp_path: Path) -> None:
    save_packed(pack_model(model, "int8"), tmp_path / "packed")
    with pytest.raises(ValueError, match="has no tokenizer, so it can read no text"):
        measure(tmp_path / "packed", "abc", rounds=1)
