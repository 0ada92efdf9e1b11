"""The product of fast-transformers, written anew, is causal linear attention with its gradients."""

import sys

import pytest
import torch

from writehead.bench.linear_peers import SUM, found_forms, peers, token_loop
from writehead.native.build import compiler


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_token_loop_is_causal_linear_attention_and_its_gradient(tmp_path):
    loop = token_loop(tmp_path)
    q, k, v = (torch.rand(2, 5, 3, 4, requires_grad=True) for _ in range(3))
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    right = torch.einsum("bhts,bshd->bthd", scores / (scores.sum(-1, keepdim=True) + SUM.eps), v)
    ours = loop(q, k, v)
    torch.testing.assert_close(ours, right)
    weight = torch.randn(2, 5, 3, 4)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, right)]
    torch.testing.assert_close(*grads)
    smallest = torch.tensor([sys.float_info.min], dtype=torch.float64)
    assert (smallest / 2).item() > 0  # loading it changed nothing for others


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_forms_side_by_side_agree_with_ours(tmp_path):
    found = peers(64, 1)
    assert set(found["seconds"]) == {"ours", *found_forms(tmp_path)}
    assert max(found["largest difference from ours"].values()) < 1e-4
