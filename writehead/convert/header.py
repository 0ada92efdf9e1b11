"""The header of a safetensors file, checked in full before a byte of data is touched."""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from writehead.convert.errors import BadFile, file_size, shown
from writehead.convert.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 64
ITEMSIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class Entry(NamedTuple):
    """Where one tensor lies: `begin` and `end` are bytes from the start of the file; the type is one of
    `ITEMSIZES`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


class Header(NamedTuple):
    """Every tensor of one file, and the file's free text."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check a header: the tensors must tile the data without gap or overlap.

    Raises:
        BadFile: anything else, naming the tensor and what was expected.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadFile(
                    path,
                    f"the header claims {length} bytes, the file has {size}: truncated or not safetensors",
                )
            if length > MAX_HEADER_BYTES:
                raise BadFile(path, f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
            text = file.read(length)
    except OSError as error:
        raise BadFile(path, (error.strerror or "cannot be read").lower()) from error
    if not text.startswith(b"{"):
        raise BadFile(path, "the header does not begin with '{': no safetensors file")
    found = parse_json(text, path, "the header")
    metadata = _metadata(path, found.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, given) for name, given in found.items()}
    _check_tiling(path, tensors, size - 8 - length)
    start = 8 + length
    moved = {
        name: one._replace(begin=start + one.begin, end=start + one.end) for name, one in tensors.items()
    }
    return Header(moved, metadata)


def _metadata(path: Path, given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise BadFile(path, f"__metadata__ is {shown(given)}; expected an object of strings")
    return given


def _entry(path: Path, name: str, given: Any) -> Entry:
    where = f"tensor {shown(name)}"
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadFile(path, f"{where} is {shown(given)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise BadFile(path, f"{where} has dtype {shown(dtype)}; accepted: {', '.join(ITEMSIZES)}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise BadFile(
            path, f"{where} has shape {shown(shape)}; expected at most {MAX_RANK} sizes of 0 or more"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadFile(path, f"{where} has data_offsets {shown(offsets)}; expected [begin, end]")
    entry = Entry(dtype, tuple(shape), *offsets)
    needed = prod(shape) * ITEMSIZES[dtype]
    if needed != entry.nbytes:
        raise BadFile(
            path, f"{where}: {dtype} {shown(shape)} needs {needed} bytes, data_offsets give {entry.nbytes}"
        )
    return entry


def _sizes(given: Any) -> bool:
    return isinstance(given, list) and all(type(size) is int and 0 <= size < 2**63 for size in given)


def _check_tiling(path: Path, tensors: dict[str, Entry], size: int) -> None:
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            kind = "overlaps its neighbour" if entry.begin < end else "leaves a gap before it"
            raise BadFile(
                path, f"tensor {shown(name)} begins at byte {entry.begin} and {kind}; expected {end}"
            )
        end = entry.end
    if end != size:
        kind = "truncated" if end > size else "bytes that belong to no tensor"
        raise BadFile(path, f"the tensors end at byte {end} of the data, which has {size}: {kind}")
