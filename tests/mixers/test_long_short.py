"""Long-Short equals its equations, causal and bidirectional, with gradients; the paper's own code is not
segment-consistent, so there is no oracle."""

import pytest
import torch
from reference.long_short import bidirectional, causal

from writehead.core.positions import Positions
from writehead.core.state import CannotRewind, detach, rewind
from writehead.mixers.long_short import LongShort, LongShortEncoder

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def disturbed(mixer):
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.3 * torch.randn_like(p)
    return mixer.double()


def weights_of(mixer):
    H, G, D, R = mixer.qkv.heads, mixer.qkv.kv_heads, mixer.qkv.head_dim, mixer.rank
    q, k, v = mixer.qkv.weight.unflatten(0, (-1, D)).split([H, G, G])
    found = {"q": q, "k": k, "v": v, "out": mixer.out.weight}
    found |= {"share": mixer.share.weight.unflatten(0, (G, R)), "share_bias": mixer.share.bias.view(G, R)}
    found |= {n: (p.weight, p.bias) for n, p in (("near", mixer.near_norm), ("far", mixer.far_norm))}
    if isinstance(mixer, LongShort):
        found |= {"u": mixer.content_bias, "w": mixer.place_bias}
        found |= {"r": mixer.near_places.weight.unflatten(0, (G, D))}
        found |= {"r_far": mixer.far_places.weight.unflatten(0, (G, D))}
    return found


def assert_equal(y, right, wanted):
    torch.testing.assert_close(y, right, **EXACT)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "chunk", "rank"), [(3, 4, 2), (6, 2, 1), (1, 3, 3)])
def test_any_window_chunk_and_rank_is_the_papers_causal_form(kv_heads, window, chunk, rank):
    mixer = disturbed(LongShort(8, heads=4, kv_heads=kv_heads, window=window, chunk=chunk, rank=rank))
    x = torch.randn(2, 11, 8).double().requires_grad_()
    right = torch.stack([causal(row, weights_of(mixer), window, chunk) for row in x])
    y, _, aux = mixer(x, Positions.range(2, 0, 11))
    assert aux == {}
    assert_equal(y, right, (x, *mixer.parameters()))


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("window", "rank"), [(3, 2), (4, 1), (1, 3), (20, 2)])
def test_any_block_and_rank_is_the_papers_bidirectional_form(kv_heads, window, rank):
    mixer = disturbed(LongShortEncoder(8, heads=4, kv_heads=kv_heads, window=window, rank=rank))
    x = torch.randn(2, 11, 8).double().requires_grad_()
    right = torch.stack([bidirectional(row, weights_of(mixer), window) for row in x])
    assert_equal(mixer.encode(x, Positions.range(2, 0, 11))[0], right, (x, *mixer.parameters()))


def test_a_chunk_is_read_only_once_it_is_over():
    mixer = disturbed(LongShort(8, heads=2, window=1, chunk=4))
    x, pos = torch.randn(1, 12, 8).double(), Positions.range(1, 0, 12)
    moved = x.clone()
    moved[:, 5] += 1
    with torch.no_grad():
        changed = (mixer(moved, pos)[0] - mixer(x, pos)[0]).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [t == 5 or t >= 8 for t in range(12)]


def test_an_open_chunk_outlives_a_detach_and_still_teaches_its_shares():
    mixer = disturbed(LongShort(8, heads=2, window=2, chunk=4))
    x = torch.randn(1, 7, 8).double()
    _, state, _ = mixer(x[:, :2], Positions.range(1, 0, 2))
    y, _, _ = mixer(x[:, 2:], Positions.range(1, 2, 7), detach(state))
    right = mixer(x, Positions.range(1, 0, 7))[0][:, 2:]
    wanted = (mixer.share.weight, mixer.far_norm.weight)
    ours = torch.autograd.grad(y[:, 2:].sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad(right[:, 2:].sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_summaries_cannot_be_taken_apart_again():
    mixer = LongShort(8, heads=2)
    _, state, _ = mixer(torch.randn(1, 3, 8), Positions.range(1, 0, 3))
    with pytest.raises(CannotRewind, match="a summary of the past cannot rewind"):
        rewind(state, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongShort(8, chunk=0), "chunk=0 and rank=1 must both be at least 1"),
        (lambda: LongShort(8, rank=0), "chunk=16 and rank=0 must both be at least 1"),
        (lambda: LongShort(8, window=0), r"Window\(window=0, after=0\): window counts the query itself"),
        (lambda: LongShortEncoder(8, window=0), "window=0 and rank=32 must both be at least 1"),
    ],
)
def test_what_the_mixers_refuse_they_say(make, message):
    with pytest.raises(ValueError, match=message):
        make()
