"""Reading GGUF files, versions 2 and 3, little endian.

Nothing in such a file is trusted: every count, length and offset is compared with the bytes that are there
before anything of that size is made, so time and memory are linear in the size of the file.
"""

import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from writehead.convert.errors import BadFile, file_size, shown
from writehead.convert.quants import DECODERS, FORMATS, dequantize

Value: TypeAlias = "int | float | bool | str | np.ndarray[Any, Any] | list[Any]"

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64
MAX_DIMS = 4
MAX_NESTING = 4
BOOL, STRING, ARRAY = 7, 8, 9
ALL = slice(None)
SCALARS = {
    number: np.dtype(code)
    for number, code in enumerate(
        ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "", "", "<u8", "<i8", "<f8")
    )
    if code
}
LEAST_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, rank, one size, type, offset


class TensorInfo(NamedTuple):
    """Where one tensor lies; `shape` is in torch's order, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class Cursor:
    """Reads a file's bytes in order and refuses to pass its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise BadFile(
                self.path, f"{what} needs {count} bytes at byte {self.at}; {self.left} are left: truncated"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, size: int, what: str) -> int:
        """The next unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def count(self, least: int, what: str) -> int:
        """The number of following things, each of at least `least` bytes."""
        count = self.unsigned(8, what)
        if count * least > self.left:
            raise BadFile(
                self.path, f"{what} is {count}; the {self.left} bytes left hold at most {self.left // least}"
            )
        return count

    def text(self, what: str, limit: int | None = None) -> str:
        """The next string."""
        length = self.unsigned(8, f"the length of {what}")
        if limit is not None and not 1 <= length <= limit:
            raise BadFile(self.path, f"{what} has {length} bytes; expected 1 to {limit}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(self.path, f"{what} is not UTF-8 text (its byte {error.start})") from error


class GGUF:
    """An open GGUF file: what it says (`metadata`), what it holds (`tensors`); data stay on disk until read.

    Metadata values are int, float, bool, str, lists of str (or of arrays), and 1-D numpy arrays of numbers.
    """

    def __init__(
        self, path: Path, data: mmap.mmap, metadata: dict[str, Value], tensors: dict[str, TensorInfo]
    ) -> None:
        self.path = path
        self.metadata: Mapping[str, Value] = metadata
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._data = data

    def raw(self, name: str) -> Tensor:
        """A tensor's blocks as stored: uint8 (..., bytes of one row), a private view of the mapped file."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        return torch.from_numpy(flat).reshape(*info.shape[:-1], info.nbytes // prod(info.shape[:-1]))

    def read(self, name: str, dtype: torch.dtype = torch.float32, some: slice = ALL) -> Tensor:
        """A tensor's numbers, or those of some of its rows, dequantised into a new tensor.

        Raises:
            BadFile: the tensor's type has no decoder here.
        """
        info = self.tensors[name]
        if info.type not in DECODERS:
            accepted = ", ".join(DECODERS)
            raise BadFile(self.path, f"tensor {shown(name)} has the type {info.type}; supported: {accepted}")
        return dequantize(self.raw(name)[some], info.type, dtype)

    def release(self) -> None:
        """Give back the memory of what was read so far; it is read anew when it is asked for."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)


def open_gguf(path: Path | str) -> GGUF:
    """Map a GGUF file and read all of it but the tensors' data.

    Raises:
        BadFile: the file is missing, truncated, of another version or byte order, or contradicts itself.
    """
    path = Path(path)
    data = _mapped(path)
    cursor = Cursor(path, data)
    _check_version(cursor)
    tensor_count = cursor.count(LEAST_TENSOR_BYTES, "the number of tensors")
    pairs = cursor.count(LEAST_PAIR_BYTES, "the number of metadata pairs")
    metadata = _metadata(cursor, pairs)
    alignment = _alignment(path, metadata)
    if tensor_count * LEAST_TENSOR_BYTES > cursor.left:
        raise BadFile(
            path, f"the number of tensors is {tensor_count}; {cursor.left} bytes are left: truncated"
        )
    stored = [_tensor(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return GGUF(path, data, metadata, _placed(path, stored, start, len(data), alignment))


def _mapped(path: Path) -> mmap.mmap:
    if not file_size(path):
        raise BadFile(path, "is empty; expected a GGUF file")
    try:
        with path.open("rb") as file:
            # copy-on-write, so that torch may look at it: it has no read-only tensors
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise BadFile(path, (error.strerror or "cannot be read").lower()) from error


def _check_version(cursor: Cursor) -> None:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise BadFile(cursor.path, f"begins with {magic!r}; a GGUF file begins with {MAGIC!r}")
    version = cursor.unsigned(4, "the version")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        raise BadFile(cursor.path, "is a big-endian GGUF file; only little-endian ones are read: convert it")
    raise BadFile(cursor.path, f"is GGUF version {version}; supported: 2 and 3")


def _metadata(cursor: Cursor, pairs: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for _ in range(pairs):
        key = cursor.text("a metadata key", MAX_KEY_BYTES)
        if key in found:
            raise BadFile(cursor.path, f"the metadata key {shown(key)} is given twice; each may stand once")
        what = f"the value of {shown(key)}"
        found[key] = _value(cursor, cursor.unsigned(4, f"the type of {shown(key)}"), what, 0)
    return found


def _value(cursor: Cursor, kind: int, what: str, depth: int) -> Value:
    if kind == STRING:
        return cursor.text(what)
    if kind == ARRAY:
        return _array(cursor, what, depth + 1)
    if kind not in SCALARS:
        raise BadFile(cursor.path, f"{what} has the type {kind}; accepted: 0 to 12")
    return _numbers(cursor, kind, 1, what)[0].item()  # type: ignore[no-any-return]


def _array(cursor: Cursor, what: str, depth: int) -> Value:
    if depth > MAX_NESTING:
        raise BadFile(cursor.path, f"{what} is an array nested more than {MAX_NESTING} deep")
    kind = cursor.unsigned(4, f"the element type of {what}")
    if kind not in SCALARS and kind not in (STRING, ARRAY):
        raise BadFile(cursor.path, f"{what} is an array of the type {kind}; accepted: 0 to 12")
    least = {STRING: 8, ARRAY: 12}.get(kind) or SCALARS[kind].itemsize
    count = cursor.count(least, f"the length of {what}")
    if kind in SCALARS:
        return _numbers(cursor, kind, count, what)
    return [_value(cursor, kind, what, depth) for _ in range(count)]


def _numbers(cursor: Cursor, kind: int, count: int, what: str) -> "np.ndarray[Any, Any]":
    found = np.frombuffer(cursor.take(count * SCALARS[kind].itemsize, what), SCALARS[kind])
    if kind != BOOL:
        return found
    if (found > 1).any():
        raise BadFile(cursor.path, f"{what} holds a boolean of {found.max()}; expected 0 or 1")
    return found.astype(np.bool_)


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    given = metadata.get("general.alignment", 32)
    if type(given) is not int or given < 1 or given & (given - 1) or given > 2**20:
        raise BadFile(path, f"general.alignment is {shown(given)}; expected a power of two up to {2**20}")
    return given


def _tensor(cursor: Cursor) -> TensorInfo:
    """One entry of the tensor table, its offset still counted from the start of the data."""
    path, name = cursor.path, cursor.text("a tensor's name", MAX_NAME_BYTES)
    where = f"tensor {shown(name)}"
    rank = cursor.unsigned(4, f"the rank of {where}")
    if not 1 <= rank <= MAX_DIMS:
        raise BadFile(path, f"{where} has {rank} dimensions; expected 1 to {MAX_DIMS}")
    sizes = struct.unpack(f"<{rank}q", cursor.take(8 * rank, f"the shape of {where}"))
    if min(sizes) < 1:
        raise BadFile(path, f"{where} has the shape {list(sizes)}; every size must be at least 1")
    kind = cursor.unsigned(4, f"the type of {where}")
    if kind not in FORMATS:
        raise BadFile(path, f"{where} has the unknown type {kind}; supported: {', '.join(DECODERS)}")
    form = FORMATS[kind]
    if sizes[0] % form.values:
        raise BadFile(path, f"{where} has rows of {sizes[0]}; {form.name} needs a multiple of {form.values}")
    nbytes = prod(sizes) // form.values * form.nbytes
    return TensorInfo(name, sizes[::-1], form.name, cursor.unsigned(8, f"the offset of {where}"), nbytes)


def _placed(
    path: Path, stored: list[TensorInfo], start: int, size: int, alignment: int
) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    end = 0
    for info in sorted(stored, key=lambda info: info.offset):
        where = f"tensor {shown(info.name)}"
        if info.offset % alignment:
            raise BadFile(path, f"{where} lies at offset {info.offset}; expected a multiple of {alignment}")
        if info.offset < end:
            raise BadFile(
                path, f"{where} lies at offset {info.offset} and overlaps its neighbour, which ends at {end}"
            )
        end = info.offset + info.nbytes
        if start + end > size:
            raise BadFile(
                path, f"{where} ends at byte {start + end}; the file has {size}: truncated or a bad offset"
            )
        if info.name in found:
            raise BadFile(path, f"{where} is listed twice; each name may stand once")
        found[info.name] = info._replace(offset=start + info.offset)
    return {info.name: found[info.name] for info in stored}
