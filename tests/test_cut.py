"""Runs cut out of a sequence are its slices, and so are their gradients."""

import torch

from writehead.ops.cut import cut


def test_runs_that_overlap_or_are_empty_are_slices_with_their_gradients():
    runs = [slice(0, 3), slice(2, 6), slice(4, 4), slice(5, 7)]
    t = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(2, len(range(*run.indices(7))), 3, dtype=torch.float64) for run in runs]
    found = []
    for pieces in (cut(t, runs), [t[:, run] for run in runs]):
        total = sum((piece * w).sum() for piece, w in zip(pieces, weights, strict=True))
        found.append((list(pieces), torch.autograd.grad(total, t)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_run_that_nothing_reads_costs_no_gradient():
    t = torch.randn(1, 5, 2, requires_grad=True)
    first, _ = cut(t, [slice(0, 2), slice(1, 5)])
    (grad,) = torch.autograd.grad(first.sum(), t)
    assert grad[0, :, 0].tolist() == [1, 1, 0, 0, 0]


def test_without_gradients_and_for_one_run_nothing_is_copied():
    t = torch.randn(1, 5, 2, requires_grad=True)
    assert cut(t, [slice(1, 4)])[0].data_ptr() == t[:, 1:].data_ptr()
    with torch.no_grad():
        assert cut(t, [slice(0, 2), slice(1, 4)])[1].data_ptr() == t[:, 1:].data_ptr()
