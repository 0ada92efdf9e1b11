"""A model's weights as the native engine reads them: matrices packed, everything else in float32."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from writehead.catalog import FEEDFORWARDS, argument
from writehead.config import ModelConfig
from writehead.core.shapes import check_choice
from writehead.model.decoder import Decoder
from writehead.model.parts import weights
from writehead.native.formats import Packed, pack, padded, unpack
from writehead.native.structs import FORMATS, LANES

TABLES = ("embedding.table", "embedding.output")
MATRIX = re.compile(r"stack\.blocks\.\d+\.(mixer\.(qkv|out)|feedforward\.(dense\.)?(inner|outer))\.weight")
INNER = re.compile(r"stack\.blocks\.(\d+)\.feedforward\.(dense\.)?inner\.(weight|bias)")


@dataclass(frozen=True)
class PackedModel:
    """A decoder in one of the packed formats.

    A gated feed-forward layer's `inner` has its rows in turns, 16 of the gate and 16 of the input, each half
    padded with zeros to a multiple of 16; its bias likewise.

    Attributes:
        config: the model.
        format: that was asked for; in "int4" the embedding and output tables are int8, and a matrix that
            float16 scales cannot serve is bfloat16.
        matrices: by the names of our weights.
        vectors: all other weights, float32.
    """

    config: ModelConfig
    format: str
    matrices: Mapping[str, Packed]
    vectors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        packed = sum(matrix.nbytes for matrix in self.matrices.values())
        return packed + sum(vector.nbytes for vector in self.vectors.values())


def pack_model(model: Decoder, format: str) -> PackedModel:
    """Pack a model's weights; the model stays as it is.

    Raises:
        ValueError: not a Decoder, an unknown format, or weights that cannot be quantised.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"{type(model).__name__} cannot be packed; the native engine runs a Decoder")
    return pack_weights(model.config, weights(model).items(), format)


def pack_weights(config: ModelConfig, named: Iterable[tuple[str, Tensor]], format: str) -> PackedModel:
    """Pack weights one by one, so that no more than one of them is there twice.

    Args:
        config: of a decoder.
        named: our weights.
        format: one of `formats.FORMATS`.

    Raises:
        ValueError: a model that is no decoder, an unknown format, or weights that cannot be quantised.
    """
    check_format(config, format)
    matrices: dict[str, Packed] = {}
    vectors: dict[str, Tensor] = {}
    for name, weight in named:
        rows = in_turns(config, name, weight)
        if is_matrix(name):
            matrices[name] = pack(rows, format_of(name, format))
        else:
            vectors[name] = rows.detach().to(torch.float32, copy=True)
    return PackedModel(config, format, matrices, vectors)


def unpack_weights(model: PackedModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The numbers of a packed model as our weights, by name."""
    own = {name: unpack(matrix, dtype) for name, matrix in model.matrices.items()}
    own |= {name: vector.to(dtype) for name, vector in model.vectors.items()}
    return {name: in_halves(model.config, name, rows) for name, rows in own.items()}


def check_format(config: ModelConfig, format: str) -> None:
    """Raise unless a model can be packed in a format."""
    check_choice("format", format, FORMATS)
    if config.kind != "decoder":
        raise ValueError(f"a model of kind {config.kind!r} cannot be packed; the native engine runs decoders")


def is_matrix(name: str) -> bool:
    """Is the weight of this name packed?"""
    return name in TABLES or MATRIX.fullmatch(name) is not None


def format_of(name: str, format: str) -> str:
    """The format of one matrix in a model of a format."""
    return "int8" if format == "int4" and name in TABLES else format


def in_turns(config: ModelConfig, name: str, rows: Tensor) -> Tensor:
    """The rows of our weight `name` in the order of the packed model; of any type, blocks of bytes too."""
    hidden = _gated(config, name)
    if hidden is None:
        return rows
    halves = rows.unflatten(0, (2, hidden))
    padding = [0, 0] * (rows.dim() - 1) + [0, -hidden % LANES]
    turns: Tensor = padded(halves, padding).unflatten(1, (-1, LANES)).transpose(0, 1).flatten(0, 2)
    return turns


def in_halves(config: ModelConfig, name: str, rows: Tensor) -> Tensor:
    """What `in_turns` was given."""
    hidden = _gated(config, name)
    if hidden is None:
        return rows
    halves: Tensor = rows.unflatten(0, (-1, 2, LANES)).transpose(0, 1).flatten(1, 2)[:, :hidden].flatten(0, 1)
    return halves


def _gated(config: ModelConfig, name: str) -> int | None:
    """The hidden width of the gated layer whose inner weight or bias this is; None if it is not one."""
    found = INNER.fullmatch(name)
    if found is None:
        return None
    spec = config.layer("feedforward", int(found[1]))
    if not argument(FEEDFORWARDS, spec, "gated"):
        return None
    return int(argument(FEEDFORWARDS, spec, "hidden") or 4 * config.dim)
