"""The structs of writehead.h, for ctypes."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_void_p

from torch import Tensor

from writehead.native.formats import FORMATS, Packed

NORMS = ("none", "rms", "layer")  # the order of these is that of the C enumerations
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "sigmoid")


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    """`wh_matrix`."""

    _fields_ = [*_fields(c_int32, "format n k"), *_fields(c_void_p, "data scales bias")]

    @classmethod
    def of(cls, packed: Packed, bias: Tensor | None = None) -> "Matrix":
        """A matrix; the tensors must live as long as it is used."""
        scales = None if packed.scales is None else packed.scales.data_ptr()
        return cls(
            FORMATS.index(packed.format), packed.n, packed.k, packed.data.data_ptr(), scales, pointer(bias)
        )


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
        *_fields(c_int32, "format layers heads kv_heads head_dim slots lead ring used"),
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


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are, None for no tensor."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return tensor.data_ptr()
