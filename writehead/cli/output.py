"""What commands print: tables for people, one JSON value for programs."""

import errno
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output: colours only on a terminal without NO_COLOR, as wide as COLUMNS or the terminal."""
    return Console(highlight=False, emoji=False, markup=False)


def print_json(value: Any) -> None:
    """One value, indented, with every character as it is."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def say(text: str) -> None:
    """Progress, on one line of a terminal's stderr, or a line each in a log; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is text and whose others are figures."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        grid.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return grid


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 38.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} TB" if count >= 999.5 else f"{count:.3g} TB"


def count(number: float) -> str:
    """A number in short: 134.5 M."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} T"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    from writehead.convert.writing import replacing

    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to write into", str(path.parent))
    with replacing(path) as temporary:
        temporary.write_bytes(data)
