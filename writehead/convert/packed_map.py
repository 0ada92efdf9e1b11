"""The file of a packed model, mapped and checked without PyTorch."""

import hashlib
import json
import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from writehead.convert.errors import BadFile, file_size, shown
from writehead.convert.header import ITEMSIZES, Entry, Header, read_header
from writehead.convert.strict_json import MAX_JSON_BYTES, parse_json
from writehead.native.outline import Outline
from writehead.native.structs import FORMATS, Matrix, shapes

FILE = "packed.safetensors"
CONFIG = "config.json"
VERSION = "1"
DATA = {"float32": "F32", "bfloat16": "BF16", "int8": "U8", "int4": "U8"}


def is_packed(folder: Path) -> bool:
    """Does a folder hold a packed model?"""
    return (folder / FILE).is_file()


def read_packed_header(folder: Path) -> Header:
    """The header of a folder's packed model.

    Raises:
        BadFile: it is missing, broken or of another version.
    """
    header = read_header(folder / FILE)
    if header.metadata.get("packed") != VERSION:
        given = shown(header.metadata.get("packed"))
        raise BadFile(
            folder / FILE, f"has packed format version {given}; this writehead reads version {VERSION}"
        )
    return header


def outline_metadata(folder: Path, outline: Outline, tensors: int) -> dict[str, str]:
    """What a header says of a model that the kernels run: its outline, and for which files it holds."""
    text = json.dumps(outline.to_dict(), separators=(",", ":"))
    return {"outline": text, "config": _digest(folder), "tensors": str(tensors)}


def outline_in(folder: Path, header: Header) -> Outline | None:
    """The outline that a header holds; None if it has none, or one of other files than are there.

    Raises:
        ValueError: something else than an outline.
    """
    said = header.metadata
    if (said.get("config"), said.get("tensors")) != (_digest(folder), str(len(header.tensors))):
        return None
    return Outline.from_dict(parse_json(said.get("outline", "").encode(), folder / FILE, "the outline"))


def format_in(n: int, k: int, data: Entry, scales: Entry | None) -> str | None:
    """The format of a matrix of n outputs and k inputs whose data and scales lie like this; None: of none."""
    for format in FORMATS:
        wanted, scaled = shapes(format, n, k)
        there = (data.dtype, data.shape, scales and (scales.dtype, scales.shape))
        if there == (DATA[format], wanted, scaled and ("F16", scaled)):
            return format
    return None


class PackedMap:
    """The weights of a packed model where they lie in its file (see `native.kernels.Weights`)."""

    def __init__(self, folder: Path, header: Header) -> None:
        """Map the file.

        Raises:
            BadFile: it cannot be read.
        """
        self._entries, self._left = header.tensors, set(header.tensors)
        try:
            with (folder / FILE).open("rb") as file:
                self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise BadFile(folder / FILE, (error.strerror or "cannot be read").lower()) from error

    def matrix(self, name: str, n: int, k: int) -> Matrix:
        """A matrix without its bias.

        Raises:
            ValueError: there is none of this size.
        """
        data, scales = self._entries.get(name), self._entries.get(f"{name}.scales")
        format = data and format_in(n, k, data, scales)
        if data is None or format is None:
            raise ValueError(f"no matrix {name} of {n} x {k}")
        where = self._address(name, data)
        return Matrix(FORMATS.index(format), n, k, where, scales and self._address(f"{name}.scales", scales))

    def vector(self, name: str, size: int) -> int | None:
        """Where a vector lies; None if there is none.

        Raises:
            ValueError: it has another size.
        """
        found = self._entries.get(name)
        if found is not None and (found.dtype, found.shape) != ("F32", (size,)):
            raise ValueError(f"{name} is {found.dtype} {found.shape}; the model asks for {size} float32")
        return found and self._address(name, found)

    def table(self, name: str, rows: int | None, width: int) -> NDArray[np.float32]:
        """The rows of a table of float32.

        Raises:
            ValueError: there is none of this size.
        """
        found = self._entries.get(name)
        if found is None or (found.dtype, found.shape) != ("F32", (rows, width)):
            raise ValueError(f"no table {name} of {rows} x {width}")
        first = self._address(name, found) - int(self._bytes.ctypes.data)
        return self._bytes[first : found.end].view(np.float32).reshape(found.shape)

    def check_all_used(self) -> None:
        """Raise if a tensor was asked for by nobody.

        Raises:
            ValueError: naming one.
        """
        if self._left:
            raise ValueError(
                f"{len(self._left)} tensors belong to no weight, such as {shown(min(self._left))}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(entry.nbytes for entry in self._entries.values())

    def bytes_of(self, name: str) -> int:
        """Bytes of one weight, its scales with it; 0 if there is none."""
        there = (self._entries.get(key) for key in (name, f"{name}.scales"))
        return sum(entry.nbytes for entry in there if entry)

    def _address(self, name: str, entry: Entry) -> int:
        if entry.end > len(self._bytes) or entry.begin % ITEMSIZES[entry.dtype]:
            raise ValueError(f"{name} lies beyond the end of the file, or not as its numbers are wide")
        self._left.discard(name)
        return int(self._bytes.ctypes.data) + entry.begin


def _digest(folder: Path) -> str:
    path = folder / CONFIG
    if (size := file_size(path)) > MAX_JSON_BYTES:
        raise BadFile(path, f"is {size} bytes; at most {MAX_JSON_BYTES} are read")
    return hashlib.sha256(path.read_bytes()).hexdigest()
