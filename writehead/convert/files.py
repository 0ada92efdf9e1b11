"""Tensors of a checkpoint: read lazily from safetensors files, written in shards."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from writehead.convert.errors import BadFile, shown
from writehead.convert.header import Entry, read_header
from writehead.convert.strict_json import read_json
from writehead.convert.writing import replacing, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]{0,200}\.safetensors")


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; each is read into memory of its own when asked for.

    Files are read, not mapped: a mapping counts as memory beside the copy that a model makes of it, and kills
    the process if somebody shortens the file.
    """

    def __init__(self, entries: dict[str, tuple[Path, Entry]], metadata: dict[str, str]) -> None:
        self._entries = entries
        self.metadata: Mapping[str, str] = metadata

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entry(name)
        return self._read(name, 0, entry.nbytes).reshape(entry.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.entry(name).shape

    def rows(self, name: str, some: slice) -> Tensor:
        """Some rows of a tensor, in memory of their own."""
        entry = self.entry(name)
        first, last, _ = some.indices(entry.shape[0])
        row = entry.nbytes // entry.shape[0]
        return self._read(name, first * row, (last - first) * row).reshape(-1, *entry.shape[1:])

    def _read(self, name: str, begin: int, nbytes: int) -> Tensor:
        path, entry = self._entries[name]
        flat = torch.empty(nbytes, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(entry.begin + begin)
                if file.readinto(flat.numpy().data) != nbytes:
                    raise OSError("the file was shortened while it was open")
        except OSError as error:
            raise BadFile(path, f"tensor {shown(name)} cannot be read: {shown(str(error), 200)}") from error
        return flat.view(DTYPES[entry.dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # the mapping's own would read the tensor

    def entry(self, name: str) -> Entry:
        """A tensor's dtype, shape and size, without reading it."""
        return self._entries[name][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for _, entry in self._entries.values())


def read_tensors(path: Path | str) -> Tensors:
    """Open a checkpoint: every header is read and checked now, data when a name is asked for.

    Args:
        path: a safetensors file, an index of shards (.index.json), or a folder that holds one of the two
            as `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        BadFile: a file is missing, malformed or truncated, or an index and its shards disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(".json"):
        return _read_index(path)
    header = read_header(path)
    return Tensors({name: (path, entry) for name, entry in header.tensors.items()}, header.metadata)


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in (WEIGHTS, INDEX) if (folder / name).exists()]
    if len(found) == 2:
        raise BadFile(folder, f"holds both {WEIGHTS} and {INDEX}; give the path of the one to read")
    if not found:
        raise BadFile(folder, f"holds neither {WEIGHTS} nor {INDEX}")
    return found[0]


def _read_index(path: Path) -> Tensors:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BadFile(
            path, f"weight_map is {shown(listed)}; expected an object from tensor names to file names"
        )
    for name, shard in listed.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise BadFile(
                path, f"{shown(name)} is in {shown(shard)}; expected a safetensors file of this folder"
            )
    entries: dict[str, tuple[Path, Entry]] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(listed.values()):
        header = read_header(path.parent / shard)
        metadata |= header.metadata
        for name, entry in header.tensors.items():
            if name in entries:
                raise BadFile(path, f"{shown(name)} is in both {entries[name][0].name} and {shard}")
            if listed.get(name) != shard:
                raise BadFile(path, f"{shown(name)} is in {shard}; the index says {shown(listed.get(name))}")
            entries[name] = (path.parent / shard, entry)
    if missing := [name for name in listed if name not in entries]:
        first = missing[0]
        raise BadFile(path, f"{shown(first)} is not in {listed[first]} ({len(missing)} such tensors)")
    return Tensors({name: entries[name] for name in listed}, metadata)


def write_tensors(
    directory: Path | str,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a checkpoint into a folder: one file, or shards and their index.

    Args:
        directory: an existing folder without a checkpoint (see `whole_or_nothing`).
        tensors: what to write, in this order; read one shard at a time.
        max_shard_bytes: a file's data may have this many bytes; a larger tensor gets its own file.
        metadata: free text for every file's header, added to {"format": "pt"}.

    Returns:
        The files written.

    Raises:
        ValueError: nothing to write, a checkpoint is there already, or two names share memory.
    """
    folder = Path(directory)
    if not tensors:
        raise ValueError("there are no tensors to write; a checkpoint holds at least one")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    if present := sorted(file.name for file in folder.glob("model*.safetensors*")):
        raise ValueError(f"{folder} already holds {present[0]}; write into a folder without a checkpoint")
    shards = _shards(tensors, max_shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _write_shard(
            folder / file, {name: tensors[name] for name in shard}, {"format": "pt", **(metadata or {})}
        )
    written = [folder / file for file in names]
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(_nbytes(tensors, name) for name in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(folder / INDEX)
    return written


def _nbytes(tensors: Mapping[str, Tensor], name: str) -> int:
    return tensors.entry(name).nbytes if isinstance(tensors, Tensors) else tensors[name].nbytes


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        size = _nbytes(tensors, name)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    owners: dict[int, str] = {}
    for name, tensor in ready.items():
        if tensor.nbytes and (other := owners.setdefault(tensor.data_ptr(), name)) != name:
            raise ValueError(f"{other} and {name} share memory; write one of them, a config states the tie")
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, metadata=metadata)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path.name} cannot be written: {shown(str(error), 300)}") from error
