"""Dropout on what a layer adds draws what torch's own function draws."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.model.decoder import Decoder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_in_one_pass_is_torchs_with_gradients(dtype: torch.dtype) -> None:
    stack = {"name": "residual", "dropout": 0.3}
    config = ModelConfig(vocab=5, dim=8, depth=1, mixer={"name": "mqa", "heads": 2}, stack=stack)
    block: Any = next(Decoder(config).train().blocks)
    x, y = (torch.randn(2, 50, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    found = []
    for add in (block._add, lambda x, y: x + F.dropout(y, 0.3)):
        torch.manual_seed(3)
        z = add(x, y)
        found.append([z, *torch.autograd.grad(z.square().sum(), (x, y))])
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], x + y)
    assert torch.equal(block.eval()._add(x, y), x + y)


def test_dropout_adds_sixteen_bits_to_thirty_two_as_torch_does() -> None:
    stack = {"name": "residual", "dropout": 0.5}
    config = ModelConfig(vocab=5, dim=8, depth=1, mixer={"name": "mqa", "heads": 2}, stack=stack)
    block: Any = next(Decoder(config).train().blocks)
    x, y = torch.randn(2, 9, 8), torch.randn(2, 9, 8).bfloat16()
    torch.manual_seed(3)
    found = block._add(x, y)
    torch.manual_seed(3)
    assert torch.equal(found, x + F.dropout(y, 0.5))
