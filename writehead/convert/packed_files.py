"""A packed model in a folder: config.json and packed.safetensors, whose tensors are used where they lie.

A matrix's data stand under its weight's name and its scales under NAME.scales. Data begin at multiples of 64
bytes, as the vectors of the processor like it; safetensors' own writer does not see to that.
"""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile, shown
from writehead.convert.files import read_json, replacing, write_json
from writehead.convert.header import DTYPES, Entry, read_header
from writehead.core.shapes import check_choice
from writehead.model.blank import blank
from writehead.model.parts import weights
from writehead.native.formats import FORMATS, Packed, shapes
from writehead.native.weights import PackedModel, check_format, in_turns, is_matrix

FILE = "packed.safetensors"
VERSION = "1"
ALIGNMENT = 64
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DATA = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8, "int4": torch.uint8}


def write_packed(folder: Path, model: PackedModel) -> None:
    """Write a packed model into an existing folder; each file complete or not at all."""
    tensors: dict[str, Tensor] = dict(model.vectors)
    for name, matrix in model.matrices.items():
        tensors[name] = matrix.data
        if matrix.scales is not None:
            tensors[f"{name}.scales"] = matrix.scales
    # what is a multiple of 64 bytes long goes first, so that what follows begins at one
    names = sorted(tensors, key=lambda name: -(tensors[name].nbytes & -tensors[name].nbytes) % ALIGNMENT)
    header: dict[str, object] = {"__metadata__": {"packed": VERSION, "format": model.format}}
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
    write_json(folder / "config.json", model.config.to_dict())


def is_packed(folder: Path) -> bool:
    """Does a folder hold a packed model?"""
    return (folder / FILE).is_file()


def read_packed(folder: Path) -> PackedModel:
    """Map a packed model: its weights are read from the disk when they are first used.

    Raises:
        BadFile: files that are missing or broken, or contradict each other.
    """
    path = folder / FILE
    header = read_header(path)
    if header.metadata.get("packed") != VERSION:
        given = shown(header.metadata.get("packed"))
        raise BadFile(path, f"has packed format version {given}; this writehead reads version {VERSION}")
    try:
        config = ModelConfig.from_dict(read_json(folder / "config.json"))
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
            kinds = [kind for kind in FORMATS if _fits(kind, weight, entry, scales)]
            if not kinds:
                shapes_found = f"{entry.shape} and {scales and scales.shape}"
                raise ValueError(
                    f"{name} and its scales have the shapes {shapes_found}; no format of a matrix "
                    f"{tuple(weight.shape)} has these"
                )
            found[name] = kinds[0]
        elif entry.dtype != torch.float32 or entry.shape != weight.shape or scales is not None:
            raise ValueError(
                f"{name} is {entry.dtype} {entry.shape}; the config asks for float32 {tuple(weight.shape)}"
            )
    if left:
        raise ValueError(f"{len(left)} tensors belong to no weight, such as {shown(min(left))}")
    return found


def _fits(format: str, weight: Tensor, data: Entry, scales: Entry | None) -> bool:
    wanted, scaled = shapes(format, *weight.shape)
    if (data.dtype, data.shape) != (DATA[format], wanted):
        return False
    return (scales and (scales.dtype, scales.shape)) == (scaled and (torch.float16, scaled))


def _mapped(path: Path, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            # copy-on-write, so that torch may look at it: it has no read-only tensors
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise BadFile(path, (error.strerror or "cannot be read").lower()) from error
    return {
        name: torch.frombuffer(
            data, dtype=one.dtype, count=one.nbytes // one.dtype.itemsize, offset=one.begin
        ).reshape(one.shape)
        for name, one in entries.items()
    }
