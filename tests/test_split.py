"""Runs of a tensor: values and gradients of `torch.split`, and gradients that need no copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from writehead.core.pattern import Window
from writehead.core.positions import Positions
from writehead.core.split import empty_like, joined, split
from writehead.mixers.softmax import Softmax


def test_runs_and_gradients_are_those_of_torch_split():
    t = torch.randn(2, 5, 6, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(2, 5, n, 3, dtype=torch.float64) for n in (3, 1, 2)]

    def gradient(parts):
        return torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), t)[0]

    ours, theirs = split(t, (3, 1, 2), 2), t.split([3, 1, 2], 2)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gradient(ours), gradient(theirs))


def test_a_run_that_nobody_uses_has_a_gradient_of_zero():
    t = torch.randn(4, 6, requires_grad=True)
    gradient = torch.autograd.grad(split(t, (2, 4), 1)[1].sum(), t)[0]
    assert torch.equal(gradient, torch.tensor([0.0] * 2 + [1.0] * 4).expand(4, -1))


def test_gradients_of_gradients_are_those_of_torch_split():
    t = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: split(t, (4, 2), 1)[0].exp(), t)


def test_per_sample_gradients_go_through_functional_transforms():
    def loss(t):
        a, b = split(t, (2, 1), 0)
        return (a * b).sum()

    t = torch.randn(5, 3)
    found = torch.func.vmap(torch.func.grad(loss))(t)
    assert torch.allclose(found, torch.stack([t[:, 2], t[:, 2], t[:, 0] + t[:, 1]], 1))


def test_gradients_that_lie_like_the_runs_are_the_whole_gradient():
    t = torch.randn(2, 5, 6, 3, requires_grad=True)
    parts = split(t, (3, 1, 2), 2)
    grads = empty_like(parts, 2)
    for n, grad in enumerate(grads):
        grad.fill_(n)
    found = torch.autograd.grad(parts, t, grads)[0]
    assert found.data_ptr() == grads[0].data_ptr()
    assert torch.equal(found[0, 0, :, 0], torch.tensor([0.0, 0, 0, 1, 2, 2]))


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (0, 1)])
def test_runs_in_another_order_or_of_another_tensor_are_not_one(order):
    whole = torch.randn(2, 6, 3)
    parts = [*whole.split([3, 1, 2], 1)[:2], whole.split([3, 1, 2], 1)[2]]
    found = joined([parts[n] for n in order], 1)
    if order == (0, 1):
        assert found is not None
        assert torch.equal(found, whole[:, :4])
        assert joined([parts[0], parts[1].clone()], 1) is None
    else:
        assert found is None


def test_only_runs_of_one_tensor_are_laid_out_behind_one_another():
    rotated, values = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 2, 3)
    q, k, v = empty_like((*rotated.split([3, 2], 2), values), 2)
    assert [t.shape[2] for t in (q, k, v)] == [3, 2, 2]
    assert joined((q, k), 2) is not None
    assert v.is_contiguous()


class Copies(TorchDispatchMode):
    """Counts how often tensors are copied behind one another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def test_the_backward_pass_of_a_window_puts_no_gradients_together():
    mixer = Softmax(16, heads=4, kv_heads=2, pattern=Window(40))
    x = torch.randn(1, 700, 16, requires_grad=True)
    y = mixer(x, Positions.range(1, 0, 700))[0]
    with Copies() as copies:
        y.sum().backward()
    assert copies.count == 0
