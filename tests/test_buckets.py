"""Attention within buckets: against loops, for any heads, rounds, sides and padding; prefixes; extremes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import buckets as reference

from writehead.ops import buckets
from writehead.ops.buckets import bucket_attention, runs


def tensors(B, T, S, H, G, D=5, E=6):
    shapes = ((B, T, H, D), (B, S, G, D), (B, S, G, E))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attention(q, k, v, q_buckets, k_buckets, q_pos, k_pos, window, scale=0.7, once=False, both_sides=False):
    k_pos = k_pos[..., None].expand(*k.shape[:3])
    rounds = [
        run
        for mine, theirs in zip(q_buckets, k_buckets, strict=True)
        for run in runs(mine, theirs, q_pos, k_pos, window, both_sides=both_sides)
    ]
    return bucket_attention(q, k, v, rounds, k_pos, window=window, scale=scale, once=once)


@given(st.data())
def test_values_and_gradients_are_those_of_loops(data):
    draw = data.draw
    G, X, R = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, T, S, window = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 14)),
        draw(st.integers(0, 18)),
        draw(st.integers(1, 5)),
    )
    once, both_sides, number = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    q, k, v = tensors(B, T, S, G * X, G)
    q_pos, k_pos = torch.arange(T).repeat(B, 1) + draw(st.integers(0, 6)), torch.arange(S).repeat(B, 1)
    q_pos[-1, : T // 4], k_pos[-1, S // 3 : S // 2] = -1, -1
    mine = [torch.randint(number, (B, T, G * X)) for _ in range(R)]
    theirs = [torch.randint(number, (B, S, G)) for _ in range(R)]
    args = (mine, theirs, q_pos, k_pos, window)
    y, lse = attention(q, k, v, *args, once=once, both_sides=both_sides)
    right, right_lse = reference.bucket_attention(q, k, v, *args, 0.7, once, both_sides)
    some = right_lse.isfinite()
    assert torch.equal(lse.isfinite(), some)
    assert torch.allclose(y, right, rtol=1e-12, atol=1e-12)
    assert torch.allclose(lse[some], right_lse[some], rtol=1e-12, atol=1e-12)
    if bool(some.any()):
        by_y, by_lse = torch.randn_like(y), torch.randn_like(lse)
        ours, theirs = (
            torch.autograd.grad((a * by_y).sum() + (b * by_lse)[some].sum(), (q, k, v))
            for a, b in ((y, lse), (right, right_lse))
        )
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_blocks_taken_one_at_a_time_give_the_same(monkeypatch):
    q, k, v = tensors(2, 40, 40, 4, 2)
    pos, bucket = torch.arange(40).repeat(2, 1), [torch.randint(3, (2, 40, n)) for n in (4, 2)]
    args = (q, k, v, [bucket[0]] * 2, [bucket[1]] * 2, pos, pos, 4)
    whole = attention(*args)
    monkeypatch.setattr(buckets, "SCORES", 1)
    for a, b in zip(whole, attention(*args), strict=True):
        assert torch.equal(a, b)


def test_a_prefix_gives_a_prefix():
    q, k, v = tensors(1, 50, 50, 2, 2)
    bucket, pos = torch.randint(4, (1, 50, 2)), torch.arange(50)[None]
    whole, _ = attention(q, k, v, [bucket], [bucket], pos, pos, 5)
    for n in (1, 7, 31):
        part, _ = attention(
            q[:, :n], k[:, :n], v[:, :n], [bucket[:, :n]], [bucket[:, :n]], pos[:, :n], pos[:, :n], 5
        )
        assert torch.allclose(part, whole[:, :n], rtol=1e-13, atol=1e-13)


def test_a_key_that_two_rounds_find_counts_twice_or_once():
    q, k, v = tensors(1, 3, 3, 1, 1)
    bucket, pos = torch.zeros(1, 3, 1, dtype=torch.int64), torch.arange(3)[None]
    args = ([bucket] * 2, [bucket] * 2, pos, pos, 2)
    twice, lse_twice = attention(q, k, v, *args)
    single, lse_once = attention(q, k, v, *args, once=True)
    assert torch.allclose(twice, single)
    assert torch.allclose(
        lse_twice[:, 1:] - lse_once[:, 1:], torch.tensor(2.0).log().double().expand(1, 2, 1)
    )


def test_keys_that_are_not_there_in_a_round_are_not_read():
    q, k, v = tensors(1, 4, 4, 1, 1)
    bucket, pos = torch.zeros(1, 4, 1, dtype=torch.int64), torch.arange(4)[None]
    there = torch.tensor([True, False, True, True]).view(1, 4, 1)
    rounds = runs(bucket, bucket, pos, pos[..., None], 1, there=there)
    y, _ = bucket_attention(q, k, v, rounds, pos[..., None], window=1, scale=1.0)
    assert torch.allclose(y[0, 2, 0], v[0, 0, 0])
    assert torch.allclose(y[0, 3, 0], v[0, 2, 0])


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = tensors(1, 30, 30, 1, 1)
    bucket, pos = torch.zeros(1, 30, 1, dtype=torch.int64), torch.arange(30)[None]
    y, lse = attention(q.detach() * 1e4, k.detach(), v.detach(), [bucket] * 3, [bucket] * 3, pos, pos, 4)
    assert bool(y.isfinite().all())
    assert bool(lse[:, 1:].isfinite().all())
    assert float(lse[:, 1:].abs().max()) > 1e3


def test_sixteen_bits_are_summed_in_thirty_two():
    q, k, v = (t.detach().bfloat16() for t in tensors(1, 64, 64, 2, 1))
    bucket, pos = torch.zeros(1, 64, 2, dtype=torch.int64), torch.arange(64)[None]
    args = ([bucket], [bucket[..., :1]], pos, pos, 32)
    y, lse = attention(q, k, v, *args)
    right, right_lse = attention(*(t.double() for t in (q, k, v)), *args)
    assert (y.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert float((lse[:, 1:] - right_lse[:, 1:]).abs().max()) < 1e-5
    assert float((y - right).abs().max()) < 2**-8 * float(right.abs().max())


@pytest.mark.parametrize(
    ("k_bucket", "k_pos", "window", "message"),
    [
        ((1, 4, 2), (1, 4, 2), 0, "window=0 must be at least 1"),
        ((1, 4, 3), (1, 4, 3), 2, "heads=4 must be a positive multiple of kv_heads=3"),
        ((2, 4, 2), (1, 4, 2), 2, r"k_bucket must have shape \(B=1, S, G\)"),
        ((1, 4, 2), (1, 5, 2), 2, r"k_pos must have shape \(B=1, S=4, G=2\)"),
    ],
)
def test_what_does_not_fit_is_refused(k_bucket, k_pos, window, message):
    zeros = [torch.zeros(shape, dtype=torch.int64) for shape in ((1, 4, 4), k_bucket, (1, 4), k_pos)]
    with pytest.raises(ValueError, match=message):
        runs(*zeros, window)
