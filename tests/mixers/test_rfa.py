"""Random Feature Attention equals its recurrence with gradients, gated or not, whatever the denominator does."""

import pytest
import torch
from reference.linear import bidirectional, project, recurrence
from reference.rfa import features
from test_linear import assert_equal_with_gradients, weights_of

from writehead.core.positions import Positions
from writehead.mixers.rfa import RFA, GatedRFA


def expected(mixer, x, kernel, eps, form, gates=None):
    rows = []
    for i, row in enumerate(x):
        q, k, v = project(row, *weights_of(mixer))
        X = mixer.qkv.heads // mixer.qkv.kv_heads
        W, sigma = mixer.features.directions, mixer.features.sigma[:, 0]
        q = torch.stack([features(q[:, h], W[h // X], sigma[h // X], kernel) for h in range(q.shape[1])], 1)
        k = torch.stack([features(k[:, g], W[g], sigma[g], kernel) for g in range(k.shape[1])], 1)
        more = () if gates is None else (gates[i],)
        rows.append(form(q, k, v, lambda total: torch.clamp(total, min=eps), *more).flatten(1))
    return torch.stack(rows) @ mixer.out.weight.T


def disturbed(mixer):
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.1 * torch.randn_like(p)
    return mixer


@pytest.mark.parametrize("kernel", ["gaussian", "arccos"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_the_recurrence_of_its_features(kernel, kv_heads):
    mixer = disturbed(RFA(8, heads=4, kv_heads=kv_heads, features=5, kernel=kernel, eps=0.3).double())
    x, pos = torch.randn(2, 6, 8).double().requires_grad_(), Positions.range(2, 0, 6)
    wanted = (x, mixer.qkv.weight, mixer.features.sigma)
    assert_equal_with_gradients(mixer(x, pos)[0], expected(mixer, x, kernel, 0.3, recurrence), wanted)
    assert_equal_with_gradients(
        mixer.encode(x, pos)[0], expected(mixer, x, kernel, 0.3, bidirectional), wanted
    )


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_the_gated_form_forgets_as_the_paper_says(eps):
    mixer = disturbed(GatedRFA(8, heads=4, kv_heads=2, features=5, eps=eps).double())
    x, pos = torch.randn(2, 7, 8).double().requires_grad_(), Positions.range(2, 0, 7)
    gates = torch.sigmoid(x @ mixer.gate.weight.T + mixer.gate.bias)
    right = expected(mixer, x, "gaussian", eps, recurrence, gates)
    assert_equal_with_gradients(
        mixer(x, pos)[0], right, (x, mixer.qkv.weight, mixer.gate.weight, mixer.gate.bias)
    )


def test_a_closed_gate_keeps_the_past_for_thousands_of_tokens_and_an_open_one_drops_it():
    mixer = GatedRFA(8, heads=1, features=4)
    x, pos = torch.randn(1, 3000, 8), Positions.range(1, 0, 3000)
    with torch.no_grad():
        mixer.gate.weight.zero_()
        states = {}
        for bias in (20.0, -20.0):
            mixer.gate.bias.fill_(bias)
            _, begun, _ = mixer(x[:, :1], Positions.range(1, 0, 1))
            first = begun.sums.s.clone()
            _, after, _ = mixer(x[:, 1:], Positions(pos.index[:, 1:]), begun)
            states[bias] = float((after.sums.s - first).norm() / first.norm())
        _, alone, _ = mixer(x[:, -1:], Positions.range(1, 0, 1))
    assert states[20.0] > 100  # 2e-9 of each of 3000 tokens beside 2e-9 of the first: all are kept alike
    torch.testing.assert_close(after.sums.s, alone.sums.s, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [RFA, GatedRFA])
def test_a_denominator_that_may_be_negative_needs_a_floor(make):
    with pytest.raises(
        ValueError, match=r"eps=0 must be above 0: a Gaussian estimate of a kernel may be negative"
    ):
        make(8, heads=2, eps=0)


def test_the_gated_form_has_no_bidirectional_one():
    assert hasattr(RFA, "encode")
    assert not hasattr(GatedRFA, "encode")
