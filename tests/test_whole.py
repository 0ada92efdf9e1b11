"""Whole sequences by tiles: the mixer obeys its laws, gives what the dense form gives, and knows when it pays."""

import pytest
import torch

from writehead.core.pattern import (
    Block,
    Causal,
    Dilated,
    Fixed,
    Full,
    Leading,
    PerHead,
    Readers,
    Strided,
    Window,
)
from writehead.core.positions import Positions
from writehead.laws import DECODING, check
from writehead.mixers.softmax import Softmax
from writehead.ops.whole import pays
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary
from writehead.positions.t5 import T5Bias

PATTERNS = {
    "sinks": Causal() & (Window(6) | Leading(3)),
    "strided": Window(4) | Strided(4),
    "fixed": (Causal() & Block(6)) | Fixed(6, 2),
    "dilated": PerHead((Window(3), Dilated(3, 2), Dilated(3, 2), Window(5))),
}


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 3, so that the laws' short sequences go by tiles; all patterns do."""
    monkeypatch.setattr("writehead.ops.blocks.BLOCK", 3)
    monkeypatch.setattr("writehead.ops.whole.SPARSE", 2.0)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("law", DECODING)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_mixer_that_trains_by_tiles_obeys(name, law):
    position = {"sinks": Rotary(4), "strided": ALiBi(4)}.get(name, T5Bias(4, buckets=8, max_distance=20))
    mixer = Softmax(
        16, heads=4, kv_heads=1 if name == "sinks" else 2, pattern=PATTERNS[name], position=position
    )
    verdict = check(mixer, law, seed=3)
    assert verdict.passed, verdict


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("law", ["encode rows", "encode padding"])
def test_an_encoder_by_tiles_obeys(law):
    pattern = Window(4, after=3) | Leading(2) | Readers(2)
    mixer = Softmax(16, heads=4, kv_heads=2, pattern=pattern, position=T5Bias(4, bidirectional=True))
    verdict = check(mixer, law)
    assert verdict.passed, verdict


@pytest.mark.parametrize("position", [None, ALiBi(4), T5Bias(4)])
@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_give_what_the_dense_form_gives_where_tokens_stand_anywhere(name, position, monkeypatch):
    mixer = Softmax(16, heads=4, kv_heads=2, pattern=PATTERNS[name], position=position).double()
    x = torch.randn(2, 40, 16).double()
    valid = torch.rand(2, 40) < 0.7
    index = torch.where(valid, valid.cumsum(1) - 1, -1)
    places = {
        "in place": Positions.range(2, 0, 40),
        "padded": Positions(index),
        "later": Positions.range(2, 7, 47),
    }
    for pos in places.values():
        dense = mixer(x, Positions(pos.index))[0]
        with monkeypatch.context() as patch:
            patch.setattr("writehead.ops.blocks.BLOCK", 4)
            patch.setattr("writehead.ops.whole.SPARSE", 2.0)
            real = pos.index >= 0
            y = mixer(x, pos)[0]
            torch.testing.assert_close(y[real], dense[real], rtol=1e-11, atol=1e-12)
            y[real].sum().backward()
        ours = [p.grad.clone() for p in mixer.parameters()]
        mixer.zero_grad()
        mixer(x, Positions(pos.index))[0][real].sum().backward()
        for a, p in zip(ours, mixer.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-10)
        mixer.zero_grad()


def test_tiles_pay_for_long_sequences_with_few_pairs_or_a_bias():
    assert not pays(Window(16), 256, False)
    assert pays(Window(16), 600, False)
    assert not pays(Window(5000), 600, False)
    assert pays(Causal(), 600, True)
    assert not pays(Full(), 600, False)
    assert not pays(Full(), 1 << 15, True)
    assert pays(PerHead((Window(16), Strided(64))), 4096, False)
