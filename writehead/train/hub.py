"""Hugging Face data sets as files: each becomes a JSONL file, which training reads like any other.

A name is hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; NAME is a data set of the hub, a folder of data
files, or one that `save_to_disk` wrote. The package `datasets` loads it.
"""

import hashlib
import importlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from writehead.convert.errors import shown
from writehead.convert.writing import replacing

PREFIX = "hf:"


def fetched(source: str, folder: Path | None = None) -> Path:
    """The JSONL file of a split, one object a row; it is made once for each content.

    Args:
        source: "hf:NAME[:CONFIG][:SPLIT]"; the split is "train" unless given.
        folder: where the files are; default a folder in the user's cache.

    Raises:
        ValueError: the package is not installed, or it cannot load the data set.
    """
    if find_spec("datasets") is None:
        raise ValueError(f"{shown(source)} needs the package datasets: pip install writehead[datasets]")
    rows = _rows(source)
    files = sorted(Path(each["filename"]).resolve() for each in rows.cache_files)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    folder = folder or _cache()
    path = folder / f"{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return path


def _rows(source: str) -> Any:
    """The split as the package gives it: rows that lie in files of its own."""
    library: Any = importlib.import_module("datasets")
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise ValueError(
            f"{shown(source)} is no data set; write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    split = rest[-1] if rest else "train"
    saved = Path(name)
    try:
        if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
            found = library.load_from_disk(name)
            if isinstance(found, library.DatasetDict):
                return found[split]
            if rest:
                raise ValueError(f"it has no splits, so none is {split!r}")
            return found
        return library.load_dataset(name, rest[0] if len(rest) == 2 else None, split=split)
    except Exception as error:  # whatever a loader raises: the cause is what its message says
        cause = error.__cause__ or error
        raise ValueError(f"{shown(source)} cannot be loaded: {' '.join(str(cause).split())}") from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "writehead" / "datasets"
