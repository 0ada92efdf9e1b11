"""The chunked loss: the whole one's value and gradients, and no more than one piece of logits."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from writehead.ops import chunked_loss as module
from writehead.ops.chunked_loss import Terms, chunked_loss, head_loss, loss_of
from writehead.train.rehearsal import Ledger, Rehearsal


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
    peaks = []
    for chunk in (8, 512):
        ledger = Ledger()
        with Rehearsal(ledger):
            head, x = nn.Linear(4, 500), torch.randn(1, 512, 4, requires_grad=True)
            chunked_loss(head, x, torch.zeros(1, 512, dtype=torch.int64), chunk=chunk).backward()
        peaks.append(ledger.peak)
    assert peaks[1] > 512 * 500 * 4
    assert peaks[0] < peaks[1] / 8


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


def formula(logits: torch.Tensor, targets: torch.Tensor, terms: Terms) -> torch.Tensor:
    """The loss by autograd, from all logits."""
    counts = targets >= 0
    logits, targets = logits[counts], targets[counts]
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, targets[:, None])[:, 0]
    return ((1 - terms.smooth) * nll + terms.smooth * (lse - logits.mean(-1)) + terms.z * lse**2).sum()


@pytest.mark.parametrize("terms", [Terms(), Terms(0.1), Terms(0, 0.01), Terms(0.2, 0.02)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_gradients_made_by_hand_are_those_of_the_formula(terms, padded, biased, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1)
    monkeypatch.setattr(module, "ROWS", 5)
    x, weight = torch.randn(3, 7, 4).double(), torch.randn(9, 4).double()
    bias, targets = torch.randn(9).double() if biased else None, torch.randint(9, (3, 7))
    if padded:
        targets[0, 3:], targets[2] = -1, -1
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    logits = F.linear(x, weight, bias)
    right = formula(logits, targets, terms)
    wanted = [right, *(3 * g for g in torch.autograd.grad(right, leaves))]
    for loss, nll, hits in (
        loss_of(F.linear(x, weight, bias), targets, terms),
        head_loss(x, weight, bias, targets, terms),
        head_loss(x, weight, bias, targets, terms, chunk=1),
    ):
        found = [loss, *torch.autograd.grad(3 * loss, leaves)]
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(found, wanted, strict=True))
        assert nll.item() == pytest.approx(formula(logits, targets, Terms()).item(), rel=1e-12)
        assert hits == ((logits.argmax(-1) == targets) & (targets >= 0)).sum()
    with torch.no_grad():
        assert torch.allclose(head_loss(x, weight, bias, targets, terms)[0], right, rtol=1e-12)


def test_a_target_as_likely_as_another_token_is_no_hit():
    logits = torch.tensor([[[2.0, 2.0, 1.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])
    assert loss_of(logits, torch.zeros(1, 3, dtype=torch.int64))[2] == 1


def test_a_sure_prediction_keeps_the_digits_of_its_loss_and_gradient():
    logits = torch.tensor([[[30.0, 0.0, 0.0]]], requires_grad=True)
    loss, _, _ = loss_of(logits, torch.zeros(1, 1, dtype=torch.int64))
    rest = 2 * math.exp(-30)
    assert loss.item() == pytest.approx(rest, rel=1e-6, abs=0)
    assert torch.autograd.grad(loss, logits)[0][0, 0].tolist() == pytest.approx(
        [-rest, rest / 2, rest / 2], rel=1e-6, abs=0
    )


def test_a_token_that_cannot_be_has_no_gradient_and_changes_no_other():
    logits = torch.randn(1, 4, 6).double()
    logits[..., 5] = -torch.inf
    logits.requires_grad_()
    targets = torch.randint(5, (1, 4))
    found = torch.autograd.grad(loss_of(logits, targets)[0], logits)[0]
    wanted = torch.autograd.grad(F.cross_entropy(logits[0, :, :5], targets[0], reduction="sum"), logits)[0]
    assert torch.allclose(found, wanted, atol=1e-13)


def test_no_counted_target_gives_zero_and_no_gradient():
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss, nll, hits = head_loss(x, weight, None, torch.full((2, 3), -1))
    assert (loss, nll, hits) == (0, 0, 0)
    assert all(not g.any() for g in torch.autograd.grad(loss, (x, weight)))


def test_under_autocast_the_head_rounds_its_products_and_sums_in_thirty_two_bits():
    x, weight = torch.randn(2, 40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = head_loss(x, weight, None, targets)
        right = F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    found, wanted = (torch.autograd.grad(each, (x, weight)) for each in (loss, right))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


def test_the_loss_goes_backwards_once_and_has_no_second_derivative():
    x, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss, _, _ = head_loss(x, weight, None, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"has first derivatives only \(create_graph=True was given\)"):
        torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(ValueError, match="goes backwards once; compute it again for a second time"):
        torch.autograd.grad(loss, x)
