"""The benches of training's memory, on tiny models."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from writehead.bench import memory, million
from writehead.train.memory import Setting

SHAPE = million.Shape(
    dim=16, depth=3, hidden=16, heads=2, head_dim=8, window=8, buckets=(8,), bucket_window=4
)


@pytest.mark.slow
def test_a_cell_is_measured_in_a_process_of_its_own() -> None:
    todo = memory._cells("tiny", memory.TINY, Setting(2, 64), ["plain"])
    [cell] = memory.run(todo, lambda text: None)
    assert not cell.error
    assert cell.off == pytest.approx(0, abs=0.15)
    assert cell.step_s > 0


def test_a_scaled_down_bert_has_berts_shape() -> None:
    large, small = memory.LARGE, memory.bert(dim=64, vocab=1024)
    assert small == replace(
        large,
        vocab=1024,
        dim=64,
        mixer={**large.mixer, "heads": 1},
        feedforward={**large.feedforward, "hidden": 256},
    )


def test_documents_are_joined_and_must_suffice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"de"))
    files = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    assert bytes(million.read_bytes(files, 4).tolist()) == b"abcd"
    with pytest.raises(ValueError, match="hold 5 bytes; 6 are needed"):
        million.read_bytes(files, 6)


@pytest.mark.slow
def test_a_step_learns_and_a_text_is_decoded_behind_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abcd" * 100)
    result = million.run(
        [tmp_path / "a.txt"], 200, shape=SHAPE, new=8, piece=64, singles=4, say=lambda text: None
    )
    assert result.loss_after < result.loss
    assert len(result.text) == 8
    assert {60, 196, 200} <= set(result.token_ms)


def test_reading_in_pieces_scores_as_reading_whole(tmp_path: Path) -> None:
    ids = torch.arange(96).remainder(7)
    torch.manual_seed(0)
    model = million.Decoder(SHAPE.config(128)).double()
    with torch.no_grad():
        logits, _ = model(ids[None])
    wanted = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]).item()
    for piece in (96, 20):
        result = million.Result(96)
        million.decode(model, ids, result, 0, new=1, piece=piece, singles=0, say=lambda text: None)
        assert result.loss_after == pytest.approx(wanted, abs=1e-9)
