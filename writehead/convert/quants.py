"""The block formats of ggml: how many values share a block, and what a block's bytes stand for.

A block is little endian. `d` is its float16 scale, `m` its float16 minimum, `q` the small integers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_VALUES = 2**20  # values dequantised at once: bounds the temporaries, not the result


class Format(NamedTuple):
    """One ggml tensor type: `values` numbers are stored in `nbytes` bytes."""

    name: str
    values: int
    nbytes: int


FORMATS = {
    0: Format("F32", 1, 4),
    1: Format("F16", 1, 2),
    2: Format("Q4_0", 32, 18),
    3: Format("Q4_1", 32, 20),
    6: Format("Q5_0", 32, 22),
    7: Format("Q5_1", 32, 24),
    8: Format("Q8_0", 32, 34),
    9: Format("Q8_1", 32, 40),
    10: Format("Q2_K", 256, 84),
    11: Format("Q3_K", 256, 110),
    12: Format("Q4_K", 256, 144),
    13: Format("Q5_K", 256, 176),
    14: Format("Q6_K", 256, 210),
    15: Format("Q8_K", 256, 292),
    16: Format("IQ2_XXS", 256, 66),
    17: Format("IQ2_XS", 256, 74),
    18: Format("IQ3_XXS", 256, 98),
    19: Format("IQ1_S", 256, 50),
    20: Format("IQ4_NL", 32, 18),
    21: Format("IQ3_S", 256, 110),
    22: Format("IQ2_S", 256, 82),
    23: Format("IQ4_XS", 256, 136),
    24: Format("I8", 1, 1),
    25: Format("I16", 1, 2),
    26: Format("I32", 1, 4),
    27: Format("I64", 1, 8),
    28: Format("F64", 1, 8),
    29: Format("IQ1_M", 256, 56),
    30: Format("BF16", 1, 2),
    34: Format("TQ1_0", 256, 54),
    35: Format("TQ2_0", 256, 66),
    39: Format("MXFP4", 32, 17),
}
BY_NAME = {kind.name: kind for kind in FORMATS.values()}


def dequantize(raw: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that blocks stand for.

    Args:
        raw: uint8, (..., bytes of one row); a row is a whole number of blocks.
        kind: the ggml name of the format, such as "Q4_1".
        dtype: of the result; the arithmetic is float32, rounded once at the end.

    Returns:
        A new tensor (..., numbers of one row).

    Raises:
        ValueError: a format without a decoder here, or rows that are not whole blocks.
    """
    if kind not in DECODERS:
        raise ValueError(f"the type {kind} cannot be dequantised; supported: {', '.join(DECODERS)}")
    form = BY_NAME[kind]
    if raw.dtype != torch.uint8 or raw.shape[-1] % form.nbytes:
        raise ValueError(
            f"rows of {raw.shape[-1]} {raw.dtype} are no whole {kind} blocks of {form.nbytes} bytes"
        )
    blocks = raw.reshape(-1, form.nbytes)
    out = torch.empty(len(blocks), form.values, dtype=dtype)
    step = max(1, CHUNK_VALUES // form.values)
    for start in range(0, len(blocks), step):
        out[start : start + step] = DECODERS[kind](blocks[start : start + step])
    return out.reshape(*raw.shape[:-1], raw.shape[-1] // form.nbytes * form.values)


def integers(raw: Tensor, kind: str, format: str) -> tuple[Tensor, Tensor] | None:
    """Blocks as the integers and scales that `native.formats.packed` lays out, where these are the same.

    Args:
        raw: uint8, (N, bytes of one row).
        kind: the ggml name of the blocks.
        format: "int8" or "int4".

    Returns:
        Values and scales of N rows, or None if that format does not hold such blocks as they are.
    """
    if (kind, format) not in (("Q8_0", "int8"), ("Q4_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")):
        return None
    blocks = raw.reshape(len(raw), -1, BY_NAME[kind].nbytes)
    scale = _halves(blocks[..., :2])
    if kind == "Q8_0":
        return blocks[..., 2:].contiguous().view(torch.int8).flatten(1), scale
    if kind == "Q4_1":
        return blocks[..., 4:].contiguous(), torch.stack([scale, _halves(blocks[..., 2:4])], -1)
    if format == "int8":
        return (_nibbles(blocks[..., 2:]).view(torch.int8) - 8).flatten(1), scale
    least = -8 * scale  # exact, unless it is beyond float16
    return (blocks[..., 2:].contiguous(), torch.stack([scale, least], -1)) if least.isfinite().all() else None


def _halves(pairs: Tensor) -> Tensor:
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _as(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    # clone: a file may place numbers at odd addresses, which a plain view must not read
    return blocks.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _half(blocks: Tensor, at: int) -> Tensor:
    return _as(blocks[:, at : at + 2], torch.float16)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Split bytes (..., n) into their fields of `bits` bits, (..., 8/bits, n), low bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return torch.bitwise_and(packed.unsqueeze(-2) >> shifts, 2**bits - 1)


def _split(blocks: Tensor, parts: int) -> Tensor:
    return blocks.reshape(len(blocks), parts, -1)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], -1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Four bytes hold one bit for each of 32 values, value 0 in the lowest bit of the first byte."""
    return _fields(packed.unsqueeze(-1), 1).reshape(len(packed), 32) << 4


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).float() - 8).mul_(_half(b, 0))


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return (q.float() - 16).mul_(_half(b, 0))


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return q.float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return _as(b[:, 2:], torch.int8).mul_(_half(b, 0))


def _q2_k(b: Tensor) -> Tensor:
    scales, d, m = b[:, :16], _half(b, 80), _half(b, 82)
    q = _fields(_split(b[:, 16:80], 2), 2).reshape(-1, 16, 16).float()
    low = (d * (scales & 15))[..., None]
    return q.mul_(low).sub_((m * (scales >> 4))[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    high, low, packed, d = b[:, :32], b[:, 32:96], b[:, 96:108], _half(b, 108)
    scale = _nibbles(packed[:, :8]) | (_fields(packed[:, 8:], 2).flatten(1) << 4)
    scale = d * (scale.float() - 32)
    q = _fields(_split(low, 2), 2).reshape(-1, 16, 16).float()
    missing = _fields(high, 1).reshape(-1, 16, 16).float()  # a set bit means that 4 is not subtracted
    return q.add_(missing.mul_(4)).sub_(4).mul_(scale[..., None]).flatten(1)


def _scale_and_min(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes hold eight 6-bit scales and minima; the last four of each lie in two pieces."""
    first, second, third = _split(packed, 3).unbind(1)
    scale = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    least = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    return scale, least


def _affine_k(b: Tensor, q: Tensor) -> Tensor:
    scale, least = _scale_and_min(b[:, 4:16])
    q = q.reshape(-1, 8, 32).float()
    return q.mul_((_half(b, 0) * scale)[..., None]).sub_((_half(b, 2) * least)[..., None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _affine_k(b, _fields(_split(b[:, 16:], 4), 4))


def _q5_k(b: Tensor) -> Tensor:
    high = _fields(b[:, 16:48], 1).reshape(-1, 4, 2, 32)
    return _affine_k(b, _fields(_split(b[:, 48:], 4), 4) | (high << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = _fields(_split(b[:, :128], 2), 4).reshape(-1, 8, 32)
    high = _fields(_split(b[:, 128:192], 2), 2).reshape(-1, 8, 32)
    scale = _half(b, 208) * _as(b[:, 192:208], torch.int8)
    q = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    return q.mul_(scale[..., None]).flatten(1)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda b: _as(b, torch.float32),
    "F16": lambda b: _as(b, torch.float16),
    "BF16": lambda b: _as(b, torch.bfloat16),
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
