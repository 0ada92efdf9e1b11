"""The study of memories: what it trains, what it evaluates, on which text."""

import gzip

import pytest
import torch

from writehead.bench.segment_memory import CASES, LONGER, SEGMENT, read, segments, study


def test_a_text_is_read_plain_or_packed_and_cut_into_neighbouring_segments(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"banana")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"banana"))
    assert read(tmp_path / "a.txt").tolist() == read(tmp_path / "a.txt.gz").tolist() == [1, 0, 2, 0, 2, 0]
    with pytest.raises(ValueError, match=r"there is no file .*none\.txt; give a text, plain or gzip"):
        read(tmp_path / "none.txt")
    text = torch.arange(4 * SEGMENT + 1)
    inputs, targets = (torch.cat(parts, 1) for parts in zip(*segments(text, 2), strict=True))
    assert inputs.flatten().tolist() == text[:-1].tolist()
    assert torch.equal(targets, inputs + 1)


def test_every_model_is_trained_and_evaluated_with_its_memory_and_longer_ones():
    text = torch.randint(5, (6000,), generator=torch.Generator().manual_seed(0))
    (row,) = study(text, ["memory 24"], 2, 1, 600)
    assert 1 < row["bits"] < 5
    assert {key.removeprefix("bits evaluated with ") for key in row} > set(LONGER["memory 24"])
    assert LONGER.keys() < CASES.keys()
