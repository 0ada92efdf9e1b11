"""A packed model in a folder: config.json and packed.safetensors, whose tensors are used where they lie.

A matrix's data stand under its weight's name and its scales under NAME.scales. Data begin at multiples of 64
bytes, as the vectors of the processor like it; safetensors' own writer does not see to that.
"""

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile, shown
from writehead.convert.files import DTYPES
from writehead.convert.header import Entry
from writehead.convert.packed_map import (
    CONFIG,
    FILE,
    VERSION,
    format_in,
    outline_metadata,
    read_packed_header,
)
from writehead.convert.strict_json import read_json
from writehead.convert.writing import replacing, write_json
from writehead.core.shapes import check_choice
from writehead.model.blank import blank
from writehead.model.parts import weights
from writehead.native.covers import NotCoveredError, cover
from writehead.native.formats import Packed
from writehead.native.structs import FORMATS
from writehead.native.weights import PackedModel, check_format, in_turns, is_matrix

ALIGNMENT = 64
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_packed(folder: Path, model: PackedModel) -> None:
    """Write a packed model into an existing folder; each file complete or not at all."""
    tensors: dict[str, Tensor] = dict(model.vectors)
    for name, matrix in model.matrices.items():
        tensors[name] = matrix.data
        if matrix.scales is not None:
            tensors[f"{name}.scales"] = matrix.scales
    # what is a multiple of 64 bytes long goes first, so that what follows begins at one
    names = sorted(tensors, key=lambda name: -(tensors[name].nbytes & -tensors[name].nbytes) % ALIGNMENT)
    write_json(folder / CONFIG, model.config.to_dict())
    metadata = {"packed": VERSION, "format": model.format}
    with suppress(NotCoveredError):
        metadata |= outline_metadata(folder, cover(model.config).outline, len(tensors))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with replacing(folder / FILE) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)


def read_packed(folder: Path) -> PackedModel:
    """Map a packed model: its weights are read from the disk when they are first used.

    Raises:
        BadFile: files that are missing or broken, or contradict each other.
    """
    path = folder / FILE
    header = read_packed_header(folder)
    try:
        config = ModelConfig.from_dict(read_json(folder / CONFIG))
        format = header.metadata.get("format", "")
        check_choice("format", format, FORMATS)
        check_format(config, format)
        if config.depth > len(header.tensors):
            raise ValueError(f"the config has {config.depth} layers, the file {len(header.tensors)} tensors")
        like = {name: in_turns(config, name, weight) for name, weight in weights(blank(config)).items()}
        formats = _formats(like, header.tensors)
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    mapped = _mapped(path, header.tensors)
    matrices = {
        name: Packed(kind, len(like[name]), like[name].shape[1], mapped[name], mapped.get(f"{name}.scales"))
        for name, kind in formats.items()
    }
    return PackedModel(config, format, matrices, {name: mapped[name] for name in like if name not in formats})


def _formats(like: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, str]:
    """The format of each matrix; raises unless the entries are those of the model, and no others."""
    found: dict[str, str] = {}
    left = set(entries)
    for name, weight in like.items():
        if name not in entries:
            raise ValueError(f"the weight {name} is missing")
        left -= {name, f"{name}.scales"}
        entry, scales = entries[name], entries.get(f"{name}.scales")
        if is_matrix(name):
            kind = format_in(len(weight), weight.shape[1], entry, scales)
            if kind is None:
                shapes_found = f"{entry.shape} and {scales and scales.shape}"
                raise ValueError(
                    f"{name} and its scales have the shapes {shapes_found}; no format of a matrix "
                    f"{tuple(weight.shape)} has these"
                )
            found[name] = kind
        elif entry.dtype != "F32" or entry.shape != weight.shape or scales is not None:
            raise ValueError(
                f"{name} is {entry.dtype} {entry.shape}; the config asks for F32 {tuple(weight.shape)}"
            )
    if left:
        raise ValueError(f"{len(left)} tensors belong to no weight, such as {shown(min(left))}")
    return found


def _mapped(path: Path, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            # copy-on-write, so that torch may look at it: it has no read-only tensors
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise BadFile(path, (error.strerror or "cannot be read").lower()) from error
    return {
        name: torch.frombuffer(
            data, dtype=DTYPES[one.dtype], count=prod(one.shape), offset=one.begin
        ).reshape(one.shape)
        for name, one in entries.items()
    }
