"""Data sets of Hugging Face as files: a split becomes a JSONL file, which training reads like any other.

A name is hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; NAME is a data set of the hub, or a folder: a copy
of one, or what `save_to_disk` wrote. Its data files are read as they are (Parquet, Arrow, JSON lines, CSV,
TSV, text), so neither the package `datasets` nor a data set's own code is needed or run. Which files are a
split's follows the hub's rules: the `configs` at the top of README.md, or else the names of the files.
"""

import csv
import fnmatch
import gzip
import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO, cast

import yaml

from writehead.convert.errors import shown
from writehead.convert.files import replacing

PREFIX = "hf:"
WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
EXTRA = "pip install writehead[datasets]"
Row = dict[str, Any]


def fetched(source: str, folder: Path | None = None) -> Path:
    """The JSONL file of a split, one object a row; it is made once for each content.

    Args:
        source: "hf:NAME[:CONFIG][:SPLIT]"; the split is "train" unless given.
        folder: where the files are; default a folder in the user's cache.

    Raises:
        ValueError: no such data set, config or split, files that cannot be read, or a missing package.
    """
    name, config, split = parsed(source)
    try:
        root = Path(name)
        names = _names(root) if root.is_dir() else _listed(name)
        if not root.is_dir():
            root = _downloaded(name, [n for n in names if n == "README.md"])
        chosen = chosen_files(names, _configs(root / "README.md"), config, split)
        if not Path(name).is_dir():
            root = _downloaded(name, chosen)
        return _written(root, chosen, folder or _cache())
    except ValueError as error:
        raise ValueError(f"{shown(source)}: {error}") from error


def parsed(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of "hf:NAME[:CONFIG][:SPLIT]".

    Raises:
        ValueError: another form.
    """
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise ValueError(
            f"{shown(source)} is no data set; write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def chosen_files(
    names: Sequence[str], configs: Sequence[Mapping[str, Any]], config: str | None, split: str
) -> list[str]:
    """The files of a split, by a data set's own `configs` if it has some, else by their names.

    Raises:
        ValueError: no such config or split, or several configs and none named.
    """
    data = sorted(n for n in names if _kind(n) in TABLES + LINES and not _hidden(n))
    if not data:
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise ValueError(f"it has no data files ({', '.join(TABLES + LINES)}); it holds {found}")
    if configs:
        splits = _declared(data, configs, config)
    else:
        if config is not None:
            folders = sorted({n.partition("/")[0] for n in data if "/" in n})
            data = [n for n in data if n.startswith(f"{config}/")]
            if not data:
                raise ValueError(f"it has no config {config!r} (it has {', '.join(folders) or 'none'})")
        splits = _named(data, config)
    if not splits.get(split):
        there = ", ".join(sorted(key for key, files in splits.items() if files)) or "none"
        raise ValueError(f"it has no split {split!r} (it has {there})")
    return splits[split]


def _declared(
    data: Sequence[str], configs: Sequence[Mapping[str, Any]], config: str | None
) -> dict[str, list[str]]:
    known = {str(c.get("config_name", "default")): c for c in configs}
    default = [name for name, c in known.items() if c.get("default") is True or len(known) == 1]
    default += ["default"] if "default" in known else []
    if config is None and not default:
        raise ValueError(f"name one of its configs: {', '.join(sorted(known))}")
    name = default[0] if config is None else config
    if name not in known:
        raise ValueError(f"it has no config {name!r} (it has {', '.join(sorted(known))})")
    chosen = known[name]
    base, files = str(chosen.get("data_dir") or "").strip("./"), chosen.get("data_files")
    if files is None:
        return _named([n for n in data if n.startswith(f"{base}/" if base else "")], base or None)
    entries = files if isinstance(files, list) else [files]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        part = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        if not {"split", "path"} <= part.keys():
            raise ValueError(f"config {name!r} has data_files {shown(entry)}; expected a split and a path")
        for pattern in part["path"] if isinstance(part["path"], list) else [part["path"]]:
            wanted = f"{base}/{pattern}" if base else str(pattern).removeprefix("./")
            found = fnmatch.filter(data, wanted) or fnmatch.filter(data, wanted.replace("**/", ""))
            splits.setdefault(str(part["split"]), []).extend(found)
    return splits


def _named(data: Sequence[str], base: str | None) -> dict[str, list[str]]:
    """Files by the split that a word of their path tells; "train" is all of them where none tells any."""
    splits: dict[str, list[str]] = {}
    for name in data:
        words = re.split(r"[^a-z]+", (name.removeprefix(f"{base}/") if base else name).lower())
        for split, signs in WORDS.items():
            if signs & set(words):
                splits.setdefault(split, []).append(name)
                break
    return splits or {"train": list(data)}


def _configs(readme: Path) -> list[Mapping[str, Any]]:
    """The `configs` in the front matter of a data set's card."""
    if not readme.is_file():
        return []
    text = readme.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        value = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise ValueError(f"the top of its README.md is no YAML: {' '.join(str(error).split())}") from None
    configs = value.get("configs") if isinstance(value, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _listed(name: str) -> list[str]:
    """The files of a data set of the hub, or of the copy of it that is here."""
    if find_spec("huggingface_hub") is None:
        raise ValueError(f"there is no folder {name}, and the hub needs huggingface_hub: {EXTRA}")
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return cast(list[str], hub.HfApi().list_repo_files(name, repo_type="dataset"))
    except Exception as error:  # no network, no such name, no access: its first line says which
        try:
            return _names(Path(hub.snapshot_download(name, repo_type="dataset", local_files_only=True)))
        except Exception:
            text = str(error).strip().partition("\n")[0]
            raise ValueError(f"there is no such folder, and the hub does not give it: {text}") from error


def _downloaded(name: str, files: list[str]) -> Path:
    """Where some files of a data set of the hub are."""
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=files or ["README.md"]))
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise ValueError(f"the hub does not give {', '.join(files[:3])}: {text}") from error


def _names(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]


def _written(root: Path, files: Sequence[str], folder: Path) -> Path:
    stats = [(n, (root / n).stat()) for n in files]
    key = [str(root.resolve()), *((n, s.st_size, s.st_mtime_ns) for n, s in stats)]
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for name in files:
                for row in _rows(root / name):
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return path


def _rows(path: Path) -> Iterator[Row]:
    kind = _kind(path.name)
    try:
        if kind in TABLES:
            yield from _table(path, kind)
            return
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            yield from _lines(file, kind)
    except (OSError, EOFError, csv.Error, UnicodeError, KeyError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error


def _table(path: Path, kind: str) -> Iterator[Row]:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{kind} files need pyarrow: {EXTRA}")
    if kind == ".parquet":
        with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        return
    arrow: Any = importlib.import_module("pyarrow")
    with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as stream:
        for batch in stream:
            yield from batch.to_pylist()


def _lines(file: TextIO, kind: str) -> Iterator[Row]:
    if kind in (".csv", ".tsv"):
        for number, row in enumerate(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","), 2):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has not as many columns as its header")
            yield cast(Row, row)
    elif kind == ".txt":
        yield from ({"text": line.rstrip("\r\n")} for line in file if line.strip())
    elif kind == ".json" and (first := file.read(1)) == "[":
        for value in json.loads(first + file.read()):
            yield _object(value)
    else:
        start = first if kind == ".json" else ""
        for line in file:
            if (start + line).strip():
                yield _object(json.loads(start + line))
            start = ""


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is no row: expected a JSON object")
    return value


def _kind(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix


def _hidden(name: str) -> bool:
    """Files that describe a data set: its card's pictures, what `save_to_disk` notes beside the data."""
    last = name.rpartition("/")[2]
    return any(part.startswith(".") for part in name.split("/")) or last in (
        "dataset_infos.json",
        "dataset_info.json",
        "dataset_dict.json",
        "state.json",
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "writehead" / "datasets"
