"""Runs cut out of a sequence are its slices, and so are their gradients; laid back they add up."""

import torch

from writehead.ops.cut import cut, lay


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


def test_runs_laid_into_a_sequence_add_up_and_their_gradients_are_its_slices():
    runs = [slice(1, 3), slice(2, 6), slice(6, 6)]
    pieces = [
        torch.randn(2, run.stop - run.start, 3, dtype=torch.float64, requires_grad=True) for run in runs
    ]
    right = torch.zeros(2, 7, 3, dtype=torch.float64)
    for run, piece in zip(runs, pieces, strict=True):
        right = torch.cat([right[:, : run.start], right[:, run] + piece, right[:, run.stop :]], 1)
    weight = torch.randn_like(right)
    for y in (lay(pieces, runs, 7), right):
        torch.testing.assert_close(y, right, rtol=0, atol=0)
        for run, grad in zip(runs, torch.autograd.grad((y * weight).sum(), pieces), strict=True):
            torch.testing.assert_close(grad, weight[:, run], rtol=0, atol=0)


def test_a_single_run_of_everything_is_not_copied():
    t = torch.randn(1, 5, 2, requires_grad=True)
    assert lay([t], [slice(0, 5)], 5) is t
