"""The comparison of LSH layers: layers of one width, figures that follow from the samples."""

import pytest
import torch

from writehead.bench import lsh


def test_buckets_are_twice_the_chunks_in_two_factors():
    for tokens in (256, 4096, 16384, 65536):
        a, b = lsh.buckets(tokens)
        assert a * b == 2 * tokens // lsh.CHUNK
        assert a % 2 == b % 2 == 0


@pytest.mark.slow
def test_figures_follow_from_the_samples(monkeypatch):
    monkeypatch.setattr(lsh, "SHORT", (256,))
    found = lsh.measure((256, 512), beside=256, rounds=1)
    by, stacks = found["seconds by length"], found["stacks"]
    ratio = by["512"].median / by["256"].median
    assert 2.0 ** found["slope"] == pytest.approx(ratio)
    assert found["reversible over residual"] == stacks["reversible"].median / stacks["residual"].median
    assert "writehead" in found["at 256"]
    assert set(found["beside dense"]["256"]) == {"writehead", "dense"}
    said = lsh.lines(found)
    assert f"at 256, writehead: {found['at 256']['writehead'].median:.3f} s" in said
    assert f"slope: {found['slope']:.2f}" in said


def test_a_call_goes_backwards_too():
    (case,) = lsh.layers(256, ["writehead"]).values()
    seen = []
    original = torch.Tensor.backward
    try:
        torch.Tensor.backward = lambda self, *a: seen.append(self.shape) or original(self, *a)
        case()
    finally:
        torch.Tensor.backward = original
    assert seen == [(1, 256, lsh.DIM)]
