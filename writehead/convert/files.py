"""Model folders: tensors read lazily from safetensors files, written in shards, whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from writehead.convert.errors import BadFile, shown
from writehead.convert.header import Entry, read_header
from writehead.convert.strict_json import read_json

__all__ = ["BadFile", "Tensors", "read_json", "read_tensors", "replacing", "whole_or_nothing", "write_json"]
__all__ += ["write_tensors"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
        return flat.view(entry.dtype)

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


def write_json(path: Path | str, obj: Mapping[str, Any]) -> None:
    """Write an object as JSON: UTF-8, indented, finite numbers only, complete or not at all.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(dict(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that is synced and takes its name at the end, or is removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_or_nothing(directory: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` when the block ends well and vanishes otherwise.

    Args:
        directory: the folder to make; its parent must exist.
        overwrite: replace a folder that is there, if it is empty or holds a config.json.

    Raises:
        ValueError: the target may not be made or replaced.
    """
    target = Path(os.path.realpath(directory))
    _check_target(target, overwrite)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        _check_target(target, overwrite)
        _take_place(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist; make it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(f"{target} exists; choose another name or allow overwriting")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ValueError(f"{target} is not a model folder (no config.json); it is not overwritten")


def _take_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
