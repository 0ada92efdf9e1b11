"""The chunked loss: the whole one's value and gradients, and no more than one piece of logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from writehead.ops.chunked_loss import chunked_loss


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_value_and_gradients_are_those_of_the_whole_loss(chunk):
    head, x = nn.Linear(6, 9).double(), torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (2, 11))
    targets[1, 3:7] = -1
    targets[0, 0] = -100
    right = F.cross_entropy(head(x).flatten(0, 1)[(targets >= 0).flatten()], targets[targets >= 0])
    ours = chunked_loss(head, x, targets, chunk=chunk)
    assert torch.allclose(ours, right, rtol=1e-13, atol=0)
    wanted = [x, head.weight, head.bias]
    for a, b in zip(*(torch.autograd.grad(loss, wanted) for loss in (ours, right)), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(chunked_loss(head, x, targets, chunk=chunk), right, rtol=1e-13, atol=0)


def test_only_one_piece_of_logits_is_held():
    head, x = nn.Linear(4, 50), torch.randn(1, 64, 4, requires_grad=True)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        chunked_loss(head, x, torch.randint(50, (1, 64)), chunk=8)
    assert max(held, default=0) < 8 * 50


def test_sixteen_bit_logits_are_summed_in_thirty_two():
    head, x = nn.Linear(4, 50).bfloat16(), torch.randn(1, 64, 4).bfloat16()
    targets = torch.randint(50, (1, 64))
    loss = chunked_loss(head, x, targets, chunk=16)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, F.cross_entropy(head(x)[0].float(), targets[0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "chunk", "message"),
    [
        (torch.zeros(1, 3), 4, r"targets must have shape \(B=1, T=5\); got \(1, 3\)"),
        (torch.zeros(1, 5), 0, "chunk=0 must be at least 1"),
        (torch.full((1, 5), -1), 4, "no target counts: all are negative"),
    ],
)
def test_what_cannot_be_is_refused(targets, chunk, message):
    with pytest.raises(ValueError, match=message):
        chunked_loss(nn.Linear(2, 3), torch.zeros(1, 5, 2), targets.long(), chunk=chunk)
