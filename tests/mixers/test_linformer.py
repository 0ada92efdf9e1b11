"""Linformer equals its equation in every sharing mode, and softmax attention with identity projections."""

import pytest
import torch
from reference.linformer import linformer

from writehead.core.pattern import Full
from writehead.core.positions import Positions
from writehead.mixers.linformer import Linformer
from writehead.mixers.softmax import Softmax

EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("sharing", ["none", "heads", "key_value"])
def test_any_sharing_is_the_papers_equation_with_its_gradients(sharing, kv_heads):
    mixer = Linformer(8, heads=4, kv_heads=kv_heads, max_context=9, rank=3, sharing=sharing).double()
    q, k, v = mixer.qkv.weight.unflatten(0, (-1, 2)).split([4, kv_heads, kv_heads])
    e, f = mixer.project.expand(9, 2, kv_heads, 3).permute(1, 2, 3, 0)
    x = torch.randn(2, 7, 8).double().requires_grad_()
    right = torch.stack([linformer(row, q, k, v, e, f, mixer.out.weight) for row in x])
    y, aux = mixer.encode(x, Positions.range(2, 0, 7))
    torch.testing.assert_close(y, right, **EXACT)
    assert aux == {}
    weight, wanted = torch.randn_like(y), (x, *mixer.parameters())
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_sharing_decides_how_many_projections_there_are():
    shapes = {s: Linformer(8, heads=4, kv_heads=2, max_context=9, rank=3, sharing=s).project.shape for s in
              ("none", "heads", "key_value")}  # fmt: skip
    assert shapes == {"none": (9, 2, 2, 3), "heads": (9, 2, 1, 3), "key_value": (9, 1, 1, 3)}


def test_identity_projections_are_softmax_attention():
    mixer = Linformer(8, heads=4, kv_heads=2, max_context=7, rank=7, sharing="key_value").double()
    full = Softmax(8, heads=4, kv_heads=2, pattern=Full()).double()
    with torch.no_grad():
        mixer.project.copy_(torch.eye(7)[:, None, None])
        full.qkv.weight.copy_(mixer.qkv.weight)
        full.out.weight.copy_(mixer.out.weight)
        x, pos = torch.randn(2, 7, 8).double(), Positions.range(2, 0, 7)
        torch.testing.assert_close(mixer.encode(x, pos)[0], full.encode(x, pos)[0], **EXACT)


def test_the_package_linformer_gives_the_same_with_copied_weights():
    package = pytest.importorskip("linformer")
    theirs = package.LinformerSelfAttention(8, 7, k=3, heads=4, one_kv_head=True).double().eval()
    mixer = Linformer(8, heads=4, kv_heads=1, max_context=7, rank=3).double()
    with torch.no_grad():
        theirs.to_out.bias.zero_()
        mixer.qkv.weight.copy_(torch.cat([theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight]))
        mixer.project.copy_(torch.stack([theirs.proj_k, theirs.proj_v], 1)[:, :, None])
        mixer.out.weight.copy_(theirs.to_out.weight)
        x = torch.randn(2, 7, 8).double()
        torch.testing.assert_close(mixer.encode(x, Positions.range(2, 0, 7))[0], theirs(x), **EXACT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linformer(8, rank=0), "max_context=512 and rank=0 must both be at least 1"),
        (lambda: Linformer(8, sharing="layer"), "unknown sharing 'layer'"),
        (
            lambda: Linformer(8, max_context=3).encode(torch.randn(1, 4, 8), Positions.range(1, 0, 4)),
            r"position 3 does not exist: this mixer has 3 positions \(0 to 2\)",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
