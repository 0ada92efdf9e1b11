"""Block-sparse attention equals the dense form pair by pair, with gradients, for any pattern, length and
head sharing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pattern import ANY

from writehead.core.pattern import (
    Axis,
    Block,
    Causal,
    Dilated,
    Fixed,
    Full,
    Image2D,
    Leading,
    PerHead,
    Random,
    Readers,
    Strided,
    Window,
)
from writehead.core.pattern.plan import estimate, parts_of, plan
from writehead.ops.blocks import Bias, block_attend
from writehead.positions.alibi import ALiBi
from writehead.positions.t5 import T5Bias


def dense(q, k, v, pattern, valid=None, bias=None):
    """Every score, one softmax a row, 0 where nothing may be read."""
    B, T, H, D = q.shape
    index = torch.arange(T).expand(B, -1)
    k_index = index if valid is None else torch.where(valid, index, -1)
    mask = pattern.mask(index, k_index)
    k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    scores = scores if bias is None else scores + bias(index[:1], index[:1], q.dtype)
    weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
    return torch.einsum("bhts,bshd->bthd", weights, v)


def inputs(T, H, G, B=2, D=4):
    shapes = ((B, T, H, D), (B, T, G, D), (B, T, G, D))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_equal(given, pattern, size, valid=None, scheme=None):
    parameters = () if scheme is None else tuple(scheme.parameters())
    bias = None if scheme is None else Bias(scheme.bias, parameters, relative=True)
    y = block_attend(*given, pattern, valid=valid, bias=bias, size=size)
    right = dense(*given, pattern, valid, None if scheme is None else scheme.bias)
    torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-12)
    weight, wanted = torch.randn_like(right), (*given, *parameters)
    ours = torch.autograd.grad((y * weight).sum(), wanted)
    theirs = torch.autograd.grad((right * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@settings(max_examples=25)
@given(ANY, st.integers(1, 23), st.sampled_from([(3, 3), (3, 1), (6, 3), (6, 2)]), st.integers(2, 7))
def test_any_pattern_gives_what_the_dense_form_gives(pattern, T, heads, size):
    heads = (3, min(heads[1], 3)) if pattern.heads and heads[0] == 6 else heads
    heads = (3, 1) if pattern.heads and 3 % heads[1] else heads
    assert_equal(inputs(T, *heads), pattern, size)


PATTERNS = {
    "window": Window(5),
    "both sides": Window(4, after=3) | Leading(2) | Readers(2),
    "strided": Window(4) | Strided(4),
    "strided alone": Strided(5),
    "fixed": (Causal() & Block(8)) | Fixed(8, 2),
    "dilated heads": PerHead((Dilated(3, 2), Dilated(3, 2), Window(5), Dilated(2, 3, 2))),
    "column": Axis(6, 7, 0),
    "row up to itself": Causal() & Axis(6, 7, 1),
    "blocks in another order": Block(6, blocks_read=(2, 0, 1, 3)),
    "random": (Causal() & Block(4)) | Random(4, 2),
    "image": Image2D(8, 2, 4, 2, 3),
    "everything": Full(),
    "the past": Causal(),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("scheme", [None, "alibi", "t5"])
def test_padding_and_biases_take_part_with_their_gradients(name, scheme):
    made = {None: None, "alibi": ALiBi(4), "t5": T5Bias(4, buckets=8, max_distance=12, bidirectional=True)}
    given_ = inputs(27, 4, 2)
    valid = torch.rand(2, 27) < 0.8
    scheme = made[scheme] if made[scheme] is None else made[scheme].double()
    assert_equal(given_, PATTERNS[name], 5, valid, scheme)
    assert_equal(given_, PATTERNS[name], 8, None, scheme)


def test_a_query_that_may_read_nothing_gives_zero_and_no_gradient():
    q, k, v = inputs(9, 2, 1)
    y = block_attend(q, k, v, Leading(3), valid=torch.arange(9).expand(2, -1) > 2, size=4)
    assert not y.any()
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_a_stride_and_summary_columns_become_contiguous_tiles():
    strided = plan(Window(16) | Strided(16), 256, 16)
    assert len(strided.parts) == 2
    assert strided.density < 0.25  # 2 blocks of the window and a few of each residue, of 16
    fixed = plan((Causal() & Block(16)) | Fixed(16, 2), 256, 16)
    assert fixed.density < 0.15  # the triangle over 1/8 of the keys and the diagonal
    assert estimate(Causal() & Block(16), 256, 16) == 1 / 16


def test_parts_are_a_cover_without_the_pairs_of_earlier_ones():
    pattern = Causal() & (Window(5) | Strided(4) | Dilated(3, 4) | Fixed(8, 2))
    parts = list(parts_of(pattern).values())
    at = torch.arange(40)
    union = torch.stack([p.allows(at[:, None], at) for p in parts]).any(0)
    assert torch.equal(union, pattern.allows(at[:, None], at))
    seen = torch.zeros(40, 40, dtype=torch.int64)
    for part in plan(pattern, 40, 8).parts:
        for tile in part.tiles:
            q, k = part.positions(tile)
            mask = [
                torch.ones(len(q), w) if m is None else m
                for m, w in zip(tile.masks, tile.widths, strict=True)
            ]
            at_q, at_k = torch.cat(mask, 1).nonzero().unbind(1)
            seen.index_put_((q[at_q], k[at_k]), torch.ones_like(at_q), accumulate=True)
    assert torch.equal(seen, union.long())


def test_half_precision_is_that_of_single_precision_rounded():
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in inputs(40, 4, 2, D=8))
    y = block_attend(q, k, v, Window(9), size=8)
    assert y.dtype == torch.bfloat16
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    right = block_attend(*wide, Window(9), size=8)
    torch.testing.assert_close(y.float(), right, rtol=2e-2, atol=2e-2)
    ours = torch.autograd.grad(y.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(right.square().sum(), wide)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 2e-2
