"""Where texts come from: files, folders, JSONL, gzip, and the sources of Python's standard library."""

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from writehead.convert.errors import shown
from writehead.train.hub import PREFIX, fetched

EMBEDDED = "stdlib"
SUFFIXES = (".txt", ".text", ".md", ".rst", ".py", ".jsonl", ".tsv")
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PIECE = 1 << 20  # characters of a long text that are held at once


class Text(NamedTuple):
    """A piece of a document; `ends` says whether it is the last."""

    text: str
    ends: bool


def files(sources: Sequence[str]) -> list[Path]:
    """The files that data sources name, in an order that depends on nothing but their names.

    Args:
        sources: files, folders (all their text files), data sets of Hugging Face ("hf:NAME:SPLIT"), or
            "stdlib": Python's own modules without their tests, mixed by a hash of their names so that the
            last ones are a fair sample.

    Raises:
        ValueError: nothing there, or a folder without text files.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == EMBEDDED:
            found += _embedded()
        elif source.startswith(PREFIX):
            found.append(fetched(source))
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p))
            if not inside:
                raise ValueError(f"{path} holds no text files ({', '.join(SUFFIXES)}, also as .gz)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"there is no {shown(source)}; give a file, a folder, or {EMBEDDED!r}")
    return found


def texts(sources: Sequence[str], field: str = "text") -> Iterator[Text]:
    """The documents of data sources: a file each, or a line each of JSONL.

    Raises:
        ValueError: a file that is empty or not text, or a JSONL line without text under `field`.
    """
    for path in files(sources):
        if _kind(path) == ".jsonl":
            for number, line in lines(path):
                (text,) = _fields(path, number, line, (field,))
                yield Text(text, True)
            continue
        held: list[str] = []
        size = 0
        for _, line in lines(path, optional=str(path) not in sources):
            if size >= PIECE:
                yield Text("".join(held), False)
                held, size = [], 0
            held.append(line)
            size += len(line)
        if held:
            yield Text("".join(held), True)


def pairs(sources: Sequence[str], names: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Two texts a line: the columns of a TSV, or two keys of JSONL.

    Args:
        sources: .tsv or .jsonl files (also .gz), or folders of them.
        names: what the two are, for JSONL keys and messages.

    Raises:
        ValueError: a line with a column or key too few or too many, or with an empty one.
    """
    for path in files(sources):
        for number, line in lines(path):
            if _kind(path) == ".jsonl":
                a, b = _fields(path, number, line, names)
            else:
                columns = line.removesuffix("\n").removesuffix("\r").split("\t")
                if len(columns) != 2:
                    stray = ": a stray tab?" if len(columns) > 2 else f": the {names[1]} is missing"
                    raise ValueError(
                        f"{path}, line {number}: has {len(columns)} columns, not the 2 of {names[0]} and "
                        f"{names[1]}{stray}"
                    )
                a, b = columns
            for name, value in zip(names, (a, b), strict=True):
                if not value.strip():
                    raise ValueError(f"{path}, line {number}: the {name} is missing")
            yield a, b


def lines(path: Path, *, optional: bool = False) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, unpacked if it is gzip, with their ends; `optional`: none is fine.

    Raises:
        ValueError: the file is empty, not UTF-8, or broken gzip.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: is not UTF-8 text (byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: is broken gzip ({error})") from None
    if not number and not optional:
        raise ValueError(f"{path}: is empty")


def _embedded() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)]
    if not found:
        raise ValueError(f"this Python has no sources of its library in {root}; give data.train")
    return sorted(found, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def _is_text(path: Path) -> bool:
    return _kind(path) in SUFFIXES and not path.name.startswith(".")


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _fields(path: Path, number: int, line: str, names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: is no JSON object with {' and '.join(names)}")
    for name in names:
        if name not in value:
            raise ValueError(
                f"{path}, line {number}: the {name} is missing; the line has {', '.join(map(shown, value))}"
            )
        if isinstance(value[name], bool) or not isinstance(value[name], str | int):
            raise ValueError(f"{path}, line {number}: {name} is {shown(value[name])}; expected a text")
    return tuple(str(value[name]) for name in names)
