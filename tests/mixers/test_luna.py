"""Luna equals its equations, causal and bidirectional; its slots go from layer to layer beside x."""

import pytest
import torch
from reference.luna import bidirectional, causal
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.mixers.luna import Luna, LunaEncoder, log2_1p_exp2
from writehead.model.encoder import Encoder
from writehead.ops import prefix

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def weights_of(mixer):
    p = mixer.parts
    heads = {"q": p.query, "c": p.key, "pq": p.pack_query, "pc": p.pack_key}
    found = {name: part.weight.unflatten(0, (-1, p.head_dim)) for name, part in heads.items()}
    return found | {"slots": p.slots, "out": p.out.weight}


def assert_equal(y, right, wanted):
    torch.testing.assert_close(y, right, **EXACT)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("piece", [64, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_causal_form_is_the_papers_with_its_gradients(kv_heads, piece, monkeypatch):
    monkeypatch.setattr(prefix, "PIECE", piece)
    mixer = Luna(8, heads=4, kv_heads=kv_heads, slots=3).double()
    x = torch.randn(2, 8, 8).double().requires_grad_()
    right = torch.stack([causal(row, weights_of(mixer)) for row in x])
    assert_equal(mixer(x, Positions.range(2, 0, 8))[0], right, (x, *mixer.parameters()))


@pytest.mark.parametrize("length", [9, 2])
def test_the_bidirectional_form_is_the_papers_with_its_gradients(length):
    mixer = LunaEncoder(8, heads=4, slots=3).double()
    x, pos = torch.randn(2, length, 8).double().requires_grad_(), Positions.range(2, 0, length)
    w = weights_of(mixer)
    right = torch.stack([bidirectional(row, w["slots"], w)[0] for row in x])
    assert_equal(mixer.encode(x, pos)[0], right, (x, *mixer.parts.parameters()))
    handed = torch.stack([bidirectional(row, w["slots"], w)[1] for row in x]) + w["slots"]
    torch.testing.assert_close(pos.streams["luna"], F.layer_norm(handed, (8,)), **EXACT)


def test_the_next_layer_reads_the_slots_that_it_is_handed():
    first, second = (LunaEncoder(8, heads=2, slots=3).double() for _ in range(2))
    x, pos = torch.randn(1, 6, 8).double(), Positions.range(1, 0, 6)
    with torch.no_grad():
        second.parts.slots.zero_()  # the paper's form
        y = second.encode(first.encode(x, pos)[0], pos)[0]
        between, packed = bidirectional(x[0], first.parts.slots, weights_of(first))
        slots = F.layer_norm(packed + first.parts.slots, (8,))
        right = bidirectional(between, slots, weights_of(second))[0]
    torch.testing.assert_close(y[0], right, **EXACT)


def test_an_encoder_hands_slots_through_its_layers_and_gives_the_last_ones():
    spec = {"name": "luna_encoder", "heads": 2, "slots": 3}
    config = ModelConfig(
        vocab=11, dim=8, depth=3, kind="encoder", mixer=spec, position={"name": "sinusoidal"}
    )
    model = Encoder(config).double()
    _, pos, _ = model(torch.randint(0, 11, (2, 7)))
    last = pos.streams["luna"]
    assert last.shape == (2, 3, 8)
    (gradient,) = torch.autograd.grad(last.square()[..., 0].sum(), model.stack.blocks[0].mixer.parts.slots)
    assert float(gradient.abs().max()) > 1e-6


def test_the_packing_function_is_one_at_zero_and_has_the_base_two():
    x = torch.tensor([0.0, 1.0, 3.0, -2.0]).double()
    right = torch.tensor([1.0, 1.584962500721156, 3.169925001442312, 0.32192809488736235], dtype=x.dtype)
    torch.testing.assert_close(log2_1p_exp2(x), right, **EXACT)


def test_with_one_write_head_the_state_is_smaller_by_the_number_of_heads():
    many, one = Luna(16, heads=4, slots=5), Luna(16, heads=4, kv_heads=1, slots=5)
    assert many.state_bytes(2, 10**6, 2) == 4 * one.state_bytes(2, 10**6, 2) == 2 * 4 * 2 * 4 * 5 * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Luna(8, slots=0), "slots=0 must be at least 1"),
        (lambda: Luna(8, heads=3), "dim=8 must be a positive multiple of heads=3; nearest is 9"),
        (lambda: Luna(8, heads=4, kv_heads=3), "heads=4 must be a positive multiple of kv_heads=3"),
        (
            lambda: Luna(8)(torch.randn(1, 3, 8), Positions.range(1, 0, 2)),
            r"x must have shape \(B=1, T=2, X=8\); got \(1, 3, 8\)",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_with_other_numbers_of_slots_are_refused():
    pos = Positions.range(1, 0, 4)
    x, _ = LunaEncoder(8, slots=3).encode(torch.randn(1, 4, 8), pos)
    with pytest.raises(ValueError, match="slots=2 must be the same in all layers; the layer before has 3"):
        LunaEncoder(8, slots=2).encode(x, pos)
