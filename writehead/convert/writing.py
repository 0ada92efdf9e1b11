"""Files and folders written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
