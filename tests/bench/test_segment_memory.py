"""The study of memories: what it trains, what it evaluates, on which text."""

import gzip
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from writehead.bench.segment_memory import CASES, LONGER, ROWS, SEGMENT, bits, config, read, segments, study
from writehead.mixers.transformer_xl import TransformerXL
from writehead.model.decoder import Decoder


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


@torch.no_grad()
@pytest.mark.parametrize("memory", [16, 32, 41])
@pytest.mark.parametrize("clamp", [None, 13])
def test_a_longer_memory_at_evaluation_is_one_long_window_read_anew_for_every_segment(memory, clamp):
    """With one layer: nothing but the M tokens before a segment and itself, at their true distances."""
    text = torch.randint(7, (ROWS * 9 * SEGMENT + 1,), generator=torch.Generator().manual_seed(1))

    def model(segment, memory):
        options = {"name": "transformer_xl", "segment": segment, "memory": memory, "clamp": clamp}
        return Decoder(replace(config(options, 7), depth=1)).double().eval()

    trained, longer, window = model(SEGMENT, 24), model(SEGMENT, memory), model(memory + SEGMENT, 0)
    for module in trained.modules():
        if isinstance(module, TransformerXL):  # what initialisation makes too small to tell right from wrong
            module.place_bias.normal_()
            module.relative.weight.normal_()
    for other in (longer, window):
        other.load_state_dict(trained.state_dict())
    inputs, targets = (torch.cat(parts, 1) for parts in zip(*segments(text, ROWS), strict=True))
    total = 0.0
    for start in range(0, inputs.shape[1], SEGMENT):
        read_anew = inputs[:, max(0, start - memory) : start + SEGMENT]
        logits = window(read_anew)[0][:, -SEGMENT:]
        wanted = targets[:, start : start + SEGMENT]
        total += float(cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    right = total / targets.numel() / math.log(2)
    assert bits(longer, text) == pytest.approx(right, rel=1e-12)
    for wrong in (memory - 1, memory + 1):
        other = model(SEGMENT, wrong)
        other.load_state_dict(trained.state_dict())
        assert bits(other, text) != pytest.approx(right, rel=1e-6)
