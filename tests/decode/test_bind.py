"""Bound modules compute what the modules compute; packed copies of matrices too, for any number of rows."""

import pytest
import torch
from tiny_models import decoder
from torch import nn
from torch.nn import functional as F

from writehead.core.bind import FEW, MANY, Product, bound, packed
from writehead.core.slots import Store
from writehead.decode import engine as engines
from writehead.decode.engine import TorchEngine


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 17, MANY, MANY + 1])
def test_a_packed_matrix_multiplies_any_number_of_rows_as_the_matrix_does(rows, bias):
    layer = nn.Linear(45, 37, bias=bias)
    run = packed(layer)
    with torch.inference_mode():
        for x in (torch.randn(rows, 45), torch.randn(45, rows).t(), torch.randn(rows, 2, 45)[:, :1]):
            torch.testing.assert_close(run(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert (run.copy is not None) == (FEW < rows <= MANY)


def test_only_float32_matrices_are_packed_and_only_by_packed():
    assert isinstance(packed(nn.Linear(3, 4)), Product)
    assert not isinstance(packed(nn.Linear(3, 4).double()), Product)
    assert not isinstance(bound(nn.Linear(3, 4)), Product)


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_matrices_are_packed_where_memory_allows_and_tokens_stay_the_same(room, monkeypatch):
    monkeypatch.setattr(engines, "available_memory", lambda: room)
    model = decoder().float()
    made = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *a: made.append(a) or reorder(*a))
    tokens = torch.randint(0, 10, (5, 6))
    logits, _ = TorchEngine(model).start(tokens, Store())
    torch.testing.assert_close(logits, model(tokens)[0][:, -1], rtol=1e-4, atol=1e-4)
    assert bool(made) == bool(room)
