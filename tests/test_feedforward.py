"""Feed-forward layers and norms equal their formulas, whole and in pieces, with gradients."""

import pytest
import torch
from torch import nn

from writehead.core.norm import RMS
from writehead.feedforward.dense import ACTIVATIONS, Chunked, Dense


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feedforward_layers_are_their_formulas_whole_and_in_pieces_with_gradients(activation, gated):
    layer = Dense(6, hidden=5, activation=activation, gated=gated, bias=True).double()
    pieces = Chunked(6, chunk=4, hidden=5, activation=activation, gated=gated, bias=True).double()
    pieces.dense.load_state_dict(layer.state_dict())
    x = torch.randn(2, 11, 6).double().requires_grad_()
    inner = x @ layer.inner.weight.T + layer.inner.bias
    f = ACTIVATIONS[activation]
    right = (
        f(inner[..., :5]) * inner[..., 5:] if gated else f(inner)
    ) @ layer.outer.weight.T + layer.outer.bias
    weight = torch.randn_like(right)
    expected = torch.autograd.grad((right * weight).sum(), [x, *layer.parameters()])
    for kind in (layer, pieces):
        y, aux = kind(x)
        close(y, right)
        assert aux == {}
        for a, b in zip(
            torch.autograd.grad((y * weight).sum(), [x, *kind.parameters()]), expected, strict=True
        ):
            close(a, b)
    with torch.no_grad():
        close(pieces(x)[0], right)


def test_chunked_layers_keep_no_inner_activations_for_the_way_back():
    x = torch.randn(1, 64, 8, requires_grad=True)
    kept = {}
    for kind in (Dense(8, hidden=100), Chunked(8, chunk=4, hidden=100)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, into=sizes: into.append(t.numel()) or t, lambda t: t
        ):
            kind(x)
        kept[type(kind)] = sum(sizes)
    assert kept[Dense] >= 64 * 100
    assert kept[Chunked] < 64 * 100


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_activations_are_torchs(name):
    x = torch.linspace(-3, 3, 50)
    module = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[name]
    assert torch.equal(ACTIVATIONS[name](x), module(x))
    assert torch.equal(ACTIVATIONS["gelu_tanh"](x), nn.GELU(approximate="tanh")(x))


def test_the_gradient_of_rms_norm_made_by_hand_is_the_slope_and_has_a_gradient_itself():
    norm, x = RMS(5, 1e-3).double(), torch.randn(2, 3, 5).double().requires_grad_()
    with torch.no_grad():
        norm.weight.normal_()

    def run(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, norm.weight))
    assert torch.autograd.gradgradcheck(run, (x, norm.weight))


def test_rms_norm_is_torchs_with_gradients_and_computes_in_float32():
    ours, theirs = RMS(16, 1e-3).double(), nn.RMSNorm(16, 1e-3).double()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(16))
        theirs.weight.copy_(ours.weight)
    for scale in (1.0, 1e-3, 0.0):
        x = (scale * torch.randn(2, 3, 16).double()).requires_grad_()
        close(ours(x), theirs(x))
        if scale:
            weight = torch.randn(2, 3, 16).double()
            a, b = (torch.autograd.grad((n(x) * weight).sum(), [x, n.weight]) for n in (ours, theirs))
            close(a[0], b[0])
            close(a[1], b[1])
    half = RMS(16, 1e-6).half()
    assert torch.equal(
        half(torch.full((1, 16), 1e4).half()), torch.ones(1, 16).half()
    )  # 1e8 is infinite in float16
