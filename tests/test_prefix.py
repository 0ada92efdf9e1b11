"""Prefix sums read by queries are a loop over tokens, with its gradients, however calls and pieces are cut."""

import pytest
import torch

from writehead.ops import prefix

B, T, G, X, D, M = 2, 7, 2, 3, 4, 5


def loop(q, k, v, total):
    found = []
    for t in range(q.shape[1]):
        total = total + torch.einsum("bgd,bgm->bgdm", k[:, t], v[:, t])
        found.append(torch.einsum("bgxd,bgdm->bgxm", q[:, t], total))
    return torch.stack(found, 1), total


def inputs():
    shapes = ((B, T, G, X, D), (B, T, G, D), (B, T, G, M), (B, G, D, M))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("piece", [1, 3, 7, 64])
def test_any_pieces_are_the_loop_with_the_gradients_of_everything(monkeypatch, piece):
    monkeypatch.setattr(prefix, "PIECE", piece)
    given = inputs()
    weights = [torch.randn(B, T, G, X, M).double(), torch.randn(B, G, D, M).double()]
    results = []
    for function in (prefix.prefix, loop):
        y, total = function(*given)
        loss = (y * weights[0]).sum() + (total * weights[1]).sum()
        results.append((y, total, *torch.autograd.grad(loss, given)))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)


def test_two_calls_are_one_and_the_sum_given_is_not_changed():
    q, k, v, total = (t.detach() for t in inputs())
    before = total.clone()
    y, after = prefix.prefix(q, k, v, total)
    first, middle = prefix.prefix(q[:, :3], k[:, :3], v[:, :3], total)
    second, last = prefix.prefix(q[:, 3:], k[:, 3:], v[:, 3:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(last, after)
    torch.testing.assert_close(total, before, rtol=0, atol=0)
