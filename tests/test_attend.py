"""attend equals the loops of the reference in values, log-sum-exp, gradients, and never expands keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.attention import attention
from torch.utils._python_dispatch import TorchDispatchMode

from writehead.ops.attend import FOLD, LONG, MANY, PIECE, attend, merge

HEADS = [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)]


def inputs(B, T, S, H, G, D=5, E=None, dtype=torch.float64, grad=False):
    shapes = ((B, T, H, D), (B, S, G, D), (B, S, G, E or D))
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def full_mask(B, H, T, S, share=0.6):
    mask = torch.rand(B, H, T, S) < share
    mask[:, :, 0] = False  # a query that may read nothing
    return mask


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 5), (4, 4), (2, 5), (20, 23)])
def test_plain_and_causal_attention_is_the_reference(T, S, H, G, exact):
    q, k, v = inputs(2, T, S, H, G)
    for causal in (False, True):
        y, lse = attend(q, k, v, causal=causal, scale=0.7, exact=exact)
        right_y, right_lse = attention(q, k, v, 0.7, causal=causal)
        close(y, right_y)
        close(lse, right_lse)
    close(attend(q, k, v, exact=exact)[0], attention(q, k, v, 5**-0.5)[0])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "S"), [(1, 5), (3, 3), (2, 4)])
def test_masks_and_biases_of_every_breadth_are_the_reference(T, S, H, G, exact):
    q, k, v = inputs(2, T, S, H, G)
    for mask_shape in ((2, 1, T, S), (1, H, T, S), (2, H, T, S), (1, 1, T, S)):
        mask = full_mask(*mask_shape)
        for bias_shape in (None, (1, H, T, S), (2, 1, T, S), (1, H, 1, S)):
            bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64)
            y, lse = attend(q, k, v, mask=mask, bias=bias, exact=exact)
            wide = (2, H, T, S)
            right = attention(
                q, k, v, 5**-0.5, mask.expand(wide), None if bias is None else bias.expand(wide)
            )
            close(y, right[0])
            close(lse, right[1])
            assert torch.equal(y[:, 0], torch.zeros_like(y[:, 0]))
            assert bool((lse[:, 0] == -torch.inf).all())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("H", "G"), HEADS)
def test_a_causal_triangle_with_a_mask_is_both(H, G, exact):
    q, k, v = inputs(2, 4, 6, H, G)
    mask = full_mask(2, 1, 4, 6)
    y, lse = attend(q, k, v, mask=mask, causal=True, exact=exact)
    right = attention(q, k, v, 5**-0.5, mask.expand(2, H, 4, 6), causal=True)
    close(y, right[0])
    close(lse, right[1])


@pytest.mark.slow
@pytest.mark.parametrize("T", [FOLD // 2, FOLD // 2 + 1])
def test_folded_queries_and_one_product_a_member_agree_with_the_reference(T):
    q, k, v = inputs(1, T, T + 3, 4, 2, D=3)
    for options in ({"causal": True}, {"mask": full_mask(1, 4, T, T + 3)}, {}):
        y, lse = attend(q, k, v, **options)
        right = attention(q, k, v, 3**-0.5, **options)
        close(y, right[0])
        close(lse, right[1])


@pytest.mark.parametrize(("S", "G"), [(LONG, 1), (LONG + 1, 2), (3 * PIECE - 1, 1)])
def test_one_token_over_pieces_of_a_long_cache_is_the_exact_form(S, G):
    q, k, v = inputs(2, 1, S, MANY * G, G)
    k[:, -1], v[:, -1] = 3 * q[:, 0, ::MANY], 7  # the last key counts, so that a lost one shows
    y, lse = attend(q, k, v, scale=0.7)
    right_y, right_lse = attend(q, k, v, scale=0.7, exact=True)
    close(y, right_y)
    close(lse, right_lse)
    low = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(attend(*low, scale=0.7)[0].double(), right_y, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2), (3, 1)])
def test_gradients_are_those_of_the_reference(H, G, exact):
    T, S = 3, 5
    q, k, v = inputs(1, T, S, H, G, grad=True)
    mask, bias = full_mask(1, H, T, S), torch.randn(1, H, T, S, dtype=torch.float64)
    weight, at_lse = torch.randn(1, T, H, 5, dtype=torch.float64), torch.randn(1, T, H, dtype=torch.float64)
    for options in ({}, {"causal": True}, {"mask": mask, "bias": bias}):
        y, lse = attend(q, k, v, exact=exact, **options)
        right_y, right_lse = attention(q, k, v, 5**-0.5, **options)
        ours, theirs = (y * weight).sum(), (right_y * weight).sum()
        if exact:
            ours = ours + (lse * at_lse)[:, 1:].sum()
            theirs = theirs + (right_lse * at_lse)[:, 1:].sum()
        for a, b in zip(
            torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(theirs, (q, k, v)), strict=True
        ):
            close(a, b)


@pytest.mark.parametrize("exact", [False, True])
def test_a_query_that_reads_nothing_has_no_gradient(exact):
    q, k, v = inputs(1, 3, 4, 4, 2, grad=True)
    bias = torch.zeros(1, 4, 3, 4, dtype=torch.float64, requires_grad=exact)
    y, _ = attend(q, k, v, mask=full_mask(1, 1, 3, 4, share=1.1), bias=bias, exact=exact)
    gradients = torch.autograd.grad(y.sum(), (q, k, v, bias) if exact else (q, k, v))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert bool((gradients[0][:, 0] == 0).all())
    assert bool((gradients[0][:, 1:] != 0).any())


def test_a_learned_bias_gets_its_gradient():
    q, k, v = inputs(1, 3, 4, 4, 2)
    bias = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    ours = torch.autograd.grad((attend(q, k, v, bias=bias)[0] * weight).sum(), bias)[0]
    theirs = torch.autograd.grad((attention(q, k, v, 5**-0.5, bias=bias)[0] * weight).sum(), bias)[0]
    close(ours, theirs)


def test_without_keys_everything_is_empty():
    q, k, v = inputs(2, 3, 0, 4, 2, E=7)
    y, lse = attend(q, k, v)
    assert torch.equal(y, torch.zeros(2, 3, 4, 7, dtype=torch.float64))
    assert torch.equal(lse, torch.full((2, 3, 4), -torch.inf, dtype=torch.float64))


def test_values_may_be_wider_than_keys():
    q, k, v = inputs(2, 3, 6, 4, 2, E=9)
    close(attend(q, k, v, causal=True)[0], attention(q, k, v, 5**-0.5, causal=True)[0])


@given(st.lists(st.integers(0, 3), min_size=9, max_size=9), st.sampled_from(HEADS), st.booleans())
def test_parts_of_any_partition_of_the_keys_merge_to_the_whole(part_of_key, heads, masked):
    torch.manual_seed(0)
    q, k, v = inputs(2, 3, 9, *heads)
    mask = full_mask(2, 1, 3, 9) if masked else torch.ones(1, 1, 3, 9, dtype=torch.bool)
    parts = []
    for part in range(4):
        own = torch.tensor([s for s in range(9) if part_of_key[s] == part], dtype=torch.int64)
        parts.append(attend(q, k[:, own], v[:, own], mask=mask[..., own]))
    y, lse = merge(parts)
    right = attend(q, k, v, mask=mask)
    close(y, right[0])
    close(lse, right[1])


def test_merged_parts_have_the_gradients_of_the_whole_also_beside_empty_rows():
    q, k, v = inputs(2, 3, 8, 4, 2, grad=True)
    mask = full_mask(2, 1, 3, 8)
    mask[:, :, 1, :5] = False  # empty in the first part only
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    parts = [attend(q, k[:, s], v[:, s], mask=mask[..., s], exact=True) for s in (slice(0, 5), slice(5, 8))]
    ours = torch.autograd.grad((merge(parts)[0] * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((attend(q, k, v, mask=mask)[0] * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_errs_no_more_than_the_reference_does_in_it(dtype, exact):
    q, k, v = (t.to(dtype) for t in inputs(2, 3, 40, 4, 2, D=16))
    right, right_lse = attention(q.double(), k.double(), v.double(), 0.25, causal=True)
    naive, naive_lse = attention(q, k, v, 0.25, causal=True)
    y, lse = attend(q, k, v, causal=True, scale=0.25, exact=exact)
    assert y.dtype == dtype
    assert float((y - right).abs().max()) <= 2 * float((naive - right).abs().max())
    assert float((lse - right_lse).abs().max()) <= 2 * float((naive_lse - right_lse).abs().max())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives which is not a view."""

    def __init__(self, *shared):
        super().__init__()
        self.most, self.views = 0, {t.untyped_storage().data_ptr() for t in shared}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.views:
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("T", "causal", "masked"), [(1, False, False), (1, False, True), (3, True, False), (20, True, False)]
)
def test_keys_and_values_are_never_expanded_to_the_query_heads(T, causal, masked, exact):
    B, S, H, G, D = 2, 64, 8, 2, 128
    q, k, v = inputs(B, T, S, H, G, D=D, dtype=torch.float32)
    mask = torch.rand(B, 1, T, S) < 0.5 if masked else None
    with Largest(q, k, v) as seen, torch.no_grad():
        attend(q, k, v, causal=causal, mask=mask, exact=exact)
    assert 0 < seen.most < B * S * H * D
    assert seen.most <= max(B * S * G * D, B * T * H * max(S, D))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 6, 2, 4)}, r"k must have shape \(B=2, S, G, D=5\); got \(2, 6, 2, 4\)"),
        ({"k": (1, 6, 2, 5)}, r"k must have shape \(B=2, S, G, D=5\); got \(1, 6, 2, 5\)"),
        ({"v": (2, 5, 2, 5)}, r"v must have shape \(B=2, S=6, G=2, E\); got \(2, 5, 2, 5\)"),
        (
            {"k": (2, 6, 3, 5), "v": (2, 6, 3, 5)},
            "heads=4 must be a positive multiple of kv_heads=3; nearest is 3",
        ),
        (
            {"k": (2, 2, 2, 5), "v": (2, 2, 2, 5), "causal": True},
            "at least as many keys as queries; got T=3, S=2",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (2, 3, 4, 5), "k": (2, 6, 2, 5), "v": (2, 6, 2, 5), "causal": False} | change
    with pytest.raises(ValueError, match=message):
        attend(*(torch.randn(shapes[name]) for name in "qkv"), causal=shapes["causal"])


def test_merging_under_autograd_needs_an_lse_with_a_gradient():
    q, k, v = inputs(1, 2, 4, 2, 2, grad=True)
    with pytest.raises(ValueError, match="merging under autograd needs an lse with a gradient: call attend"):
        merge([attend(q, k, v), attend(q, k, v)])
