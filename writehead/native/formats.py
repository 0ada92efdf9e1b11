"""The formats of matrices that the native engine reads: quantising, packing and unpacking, exactly.

A matrix of N outputs and K inputs is cut into panels of 16 outputs, whose numbers for one input (int8: for
four) lie side by side, so that one vector of the processor holds them. N is padded to a multiple of 16, K to
a multiple of 32. The bytes are the same for every processor. Integers share a scale in groups of 32 inputs:

    int8    w = scale * (u - 128)      as GGUF's Q8_0
    int4    w = scale * q + minimum    as GGUF's Q4_1, and its Q4_0 with minimum = -8 scale
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.core.shapes import check_choice
from writehead.native.structs import FORMATS, GROUP, LANES, shapes

CHUNK_VALUES = 2**19  # weights quantised at once: temporaries stay in the cache
STEPS = {"int8": 127, "int4": 15}  # of a group's scale, from zero or from its minimum to its largest value
LEAST_SCALE = 2.0**-20  # below it a float16 has fewer than four bits
LARGEST_SCALE = torch.finfo(torch.float16).max


class Quantised(NamedTuple):
    """Rows of a matrix as `packed` takes them.

    Attributes:
        values, scales: integers and float16.
        largest: magnitude of a weight.
    """

    values: Tensor
    scales: Tensor
    largest: float

    @classmethod
    def of(cls, rows: Callable[[slice], Tensor], n: int, k: int, format: str) -> "Quantised":
        """Quantise rows, some at a time, so that no more than a piece of the matrix is there in floats.

        Args:
            rows: gives some of the n rows, of k floats each.
            n, k: outputs and inputs.
            format: "int8" or "int4".

        Raises:
            ValueError: weights that are not finite.
        """
        groups, bytes = -(-k // GROUP), GROUP if format == "int8" else GROUP // 2
        values = torch.empty(n, groups, bytes, dtype=torch.int8 if format == "int8" else torch.uint8)
        scales = torch.empty((n, groups) if format == "int8" else (n, groups, 2), dtype=torch.float16)
        ends = []
        step = max(1, CHUNK_VALUES // k)
        for first in range(0, n, step):
            some = slice(first, min(first + step, n))
            piece = rows(some)
            ends.append(torch.stack(torch.aminmax(piece)))
            values[some], scales[some] = (_int8 if format == "int8" else _int4)(piece)
        low, high = float(torch.stack(ends)[:, 0].amin()), float(torch.stack(ends)[:, 1].amax())
        largest = max(-low, high)
        if not largest < float("inf"):
            raise ValueError(f"weights that are not finite cannot be quantised; found {low} to {high}")
        return cls(values.flatten(1) if format == "int8" else values, scales, largest)


@dataclass(frozen=True)
class Packed:
    """A matrix as the native engine reads it.

    Attributes:
        format: one of `structs.FORMATS`.
        n, k: outputs N and inputs K without padding.
        data: float (N/16, K, 16); int8 (N/16, K/4, 16, 4); int4 (N/16, K/32, 4, 16, 4), where byte i of
            vector j holds input 4 j + i of the group in its low half and 16 + 4 j + i in its high half.
        scales: float16; int8 (N/16, K/32, 16); int4 (N/16, K/32, 2, 16), scales then minima; else None.
    """

    format: str
    n: int
    k: int
    data: Tensor
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight: Tensor, format: str) -> Packed:
    """Quantise and pack a matrix (N, K) of floats.

    A matrix whose scales or minima float16 cannot hold (weights beyond 8e6 in int8, 65504 in int4, or none
    above about 1e-4) is kept in bfloat16 instead; the result says so.

    Raises:
        ValueError: an unknown format, not a matrix, or weights to quantise that are not finite.
    """
    check_choice("format", format, FORMATS)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} cannot be packed; expected (N, K), not empty"
        )
    N, K = weight.shape
    return pack_rows(weight.__getitem__, N, K, format)


def pack_rows(rows: Callable[[slice], Tensor], n: int, k: int, format: str) -> Packed:
    """As `pack`, of a matrix that is asked for some rows at a time, so that it is never there as a whole."""
    if format in STEPS:
        quantised = Quantised.of(rows, n, k, format)
        if not held(quantised.largest, format):
            return pack_rows(rows, n, k, "bfloat16")
        return packed(format, n, k, quantised.values, quantised.scales)
    data = torch.empty(shapes(format, n, k)[0], dtype=getattr(torch, format))
    step = max(1, CHUNK_VALUES // (k * LANES))
    for first in range(0, len(data), step):
        panels = data[first : first + step]
        piece = rows(slice(first * LANES, min((first + step) * LANES, n)))
        filled = padded(piece, (0, -k % GROUP, 0, -len(piece) % LANES)).unflatten(0, (-1, LANES))
        panels.copy_(filled.transpose(1, 2))
    return Packed(format, n, k, data)


def packed(format: str, n: int, k: int, values: Tensor, scales: Tensor) -> Packed:
    """Lay out integers that are quantised already.

    Args:
        format: "int8" or "int4".
        n, k: outputs and inputs without padding; the tensors' K is padded, their N need not be.
        values: (N, K) int8, or for int4 uint8 (N, K/32, 16) as in GGUF: byte b of a group holds input b in
            the low half, 16 + b in the high half.
        scales: float16 (N, K/32), or for int4 (N, K/32, 2).
    """
    if format == "int8":
        values = values.view(torch.uint8) ^ 128
    lanes = -len(values) % LANES
    fours = values.reshape(len(values), -1).view(torch.int32)
    fours = padded(fours, (0, 0, 0, lanes)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
    groups = scales.reshape(len(scales), -1)
    groups = padded(groups, (0, 0, 0, lanes)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
    data, scaled = shapes(format, n, k)
    assert scaled is not None
    return Packed(format, n, k, fours.view(torch.uint8).reshape(data), groups.reshape(scaled))


def held(largest: float, format: str) -> bool:
    """Can float16 hold the scales and minima of a matrix whose weights are at most so large?"""
    top = largest / STEPS["int8"] if format == "int8" else largest
    return top <= LARGEST_SCALE and not 0 < largest < LEAST_SCALE * STEPS[format]


def unpack(matrix: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that a packed matrix stands for, (N, K); in float64 without rounding."""
    data, n, k = matrix.data, matrix.n, matrix.k
    panels = len(data)
    if matrix.scales is None:
        return data.transpose(1, 2).flatten(0, 1)[:n, :k].to(dtype, copy=True)
    wide = torch.promote_types(dtype, torch.float32)
    fours = data.reshape(panels, -1, LANES, 4).transpose(1, 2)  # (panels, 16, vectors, 4)
    if matrix.format == "int8":
        values = fours.reshape(panels * LANES, -1, GROUP).to(wide) - 128
        scale = matrix.scales.transpose(1, 2).flatten(0, 1).to(wide)
        return (values * scale[..., None]).flatten(1)[:n, :k].to(dtype)
    bytes = fours.reshape(panels * LANES, -1, 16)
    values = torch.cat([bytes & 15, bytes >> 4], -1).to(wide)
    scale, least = matrix.scales.permute(2, 0, 3, 1).flatten(1, 2).to(wide).unbind(0)
    return (values * scale[..., None] + least[..., None]).flatten(1)[:n, :k].to(dtype)


def padded(rows: Tensor, padding: Sequence[int], mode: str = "constant") -> Tensor:
    """As torch's `pad`, but without a copy where nothing is added."""
    return F.pad(rows, list(padding), mode=mode) if any(padding) else rows


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, K/32, 32) and scales (N, K/32) of each group of 32."""
    w = _grouped(rows, "constant")
    scale = _scale(w.abs().amax(-1), STEPS["int8"])
    return w.mul_(_inverse(scale)).round_().clamp_(-127, 127), scale


def _int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, K/32, 16), two a byte, and scales with minima (N, K/32, 2) of each group of 32."""
    w = _grouped(rows, "replicate")
    low, high = torch.aminmax(w, dim=-1)
    least = low.half()
    scale = _scale(high - least.float(), STEPS["int4"])
    q = w.sub_(least[..., None]).mul_(_inverse(scale)).round_().clamp_(0, STEPS["int4"]).to(torch.uint8)
    return q[..., :16] | q[..., 16:] << 4, torch.stack([scale, least], -1)


def _grouped(rows: Tensor, padding: str) -> Tensor:
    """Rows as groups (N, K/32, 32) of float32 in new memory; the padding widens no group's range."""
    wide = rows.to(torch.float32, copy=True)
    groups: Tensor = padded(wide, (0, -rows.shape[1] % GROUP), padding).unflatten(1, (-1, GROUP))
    return groups


def _scale(span: Tensor, steps: int) -> Tensor:
    """Float16 scales that reach over a span; one rounded so far down that it would not is the next above."""
    half = (span / steps).half()
    short = half.float() * (steps + 0.49) < span
    return torch.where(short, (half.view(torch.int16) + 1).view(torch.float16), half)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.float().reciprocal(), 0)[..., None]
