"""The structs of writehead.h, for ctypes, and the shapes of what they point to."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_void_p
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from writehead.native.formats import Packed

FORMATS = ("float32", "bfloat16", "int8", "int4")  # the order of these is that of the C enumerations
NORMS = ("none", "rms", "layer")
NO_TOKEN = -2  # `WH_NO_TOKEN`
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "sigmoid")
LANES, GROUP = 16, 32  # outputs side by side in a packed matrix; inputs that share a scale
BLOCK = LANES  # slots of a cache whose keys lie side by side


def shapes(format: str, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shapes of a packed matrix of n outputs and k inputs: its data, its scales."""
    panels, groups = -(-n // LANES), -(-k // GROUP)
    if format == "int8":
        return (panels, groups * GROUP // 4, LANES, 4), (panels, groups, LANES)
    if format == "int4":
        return (panels, groups, 4, LANES, 4), (panels, groups, 2, LANES)
    return (panels, groups * GROUP, LANES), None


def round_up(count: int) -> int:
    """A count rounded up to whole vectors of `LANES`, which is whole blocks of slots too."""
    return -(-count // LANES) * LANES


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    """`wh_matrix`."""

    _fields_ = [*_fields(c_int32, "format n k"), *_fields(c_void_p, "data scales bias")]

    @classmethod
    def of(cls, packed: "Packed") -> "Matrix":
        """A matrix without a bias; the tensors must live as long as it is used."""
        data, scales = pointer(packed.data), pointer(packed.scales)
        return cls(FORMATS.index(packed.format), packed.n, packed.k, data, scales)


class Norm(ctypes.Structure):
    """`wh_norm`."""

    _fields_ = [("kind", c_int32), ("eps", c_float), *_fields(c_void_p, "weight bias")]


class Layer(ctypes.Structure):
    """`wh_layer`."""

    _fields_ = [
        *_fields(Matrix, "qkv out inner outer"),
        *_fields(Norm, "norm inner_norm q_norm k_norm"),
        ("scale", c_float),
        *_fields(c_int32, "window lead cache layer hidden activation gated"),
    ]


class Model(ctypes.Structure):
    """`wh_model`."""

    _fields_ = [
        *_fields(c_int32, "depth dim vocab parallel rotary interleaved"),
        *_fields(c_float, "embed_scale logit_scale"),
        *_fields(Norm, "embed_norm last_norm"),
        *_fields(Matrix, "table head"),
        ("slopes", c_void_p),
        ("layers", POINTER(Layer)),
    ]


class Cache(ctypes.Structure):
    """`wh_cache`."""

    _fields_ = [
        *_fields(c_int32, "format layers heads kv_heads head_dim slots lead ring"),
        *_fields(c_void_p, "k v k_scale v_scale pos"),
    ]


class Call(ctypes.Structure):
    """`wh_call`."""

    _fields_ = [
        *_fields(c_int32, "rows tokens"),
        *_fields(c_void_p, "ids next"),
        ("caches", POINTER(Cache)),
        *_fields(c_void_p, "turns places wanted logits"),
        ("logits_apart", c_int32),
    ]


def pointer(tensor: "Tensor | None") -> int | None:
    """Where a tensor's numbers are, None for no tensor."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return tensor.data_ptr()
