"""What the kernels compute, in PyTorch: the same quantised activations, and sums in float64."""

import torch
from torch import Tensor

from writehead.native.formats import STEPS, Packed, unpack
from writehead.native.structs import GROUP


def quantised(x: Tensor) -> Tensor:
    """Rows (B, K) of float32 as the int8 values and the scale of each group of 32 say them, in float64."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 1e-36, torch.full_like(top, 127) / top, 0)  # 127 / top would round twice
    values = (groups * inverse).round()  # halves go to the even number, as the processor rounds
    return (values.double() * (top / 127).double()).flatten(1)[:, : x.shape[1]]


def product(matrix: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, K) times the matrix, (B, N) in float64."""
    x = quantised(x) if matrix.format in STEPS else x.double()
    y = x @ unpack(matrix, torch.float64).T
    return y if bias is None else y + bias.double()
