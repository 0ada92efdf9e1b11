"""Rows of the catalog as commands speak of them: by name over all tables, with cards, arguments, settings."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import typer

from writehead.catalog import FEEDFORWARDS, MIXERS, PIXELS, POSITIONS, STACKS, Row, load

TABLES = {
    "mixers": MIXERS,
    "feed-forward layers": FEEDFORWARDS,
    "positions": POSITIONS,
    "stacks": STACKS,
    "pixels": PIXELS,
}
FIELDS = ("Paper", "Equation", "State", "Cost", "Decodes", "Differs")
REQUIRED = "(required)"
WORDS = {"True": True, "False": False, "None": None}


class Argument(NamedTuple):
    """An argument of a system: its value unless it is set otherwise, and what its docstring says."""

    name: str
    value: Any
    says: str


def find_any(name: str) -> tuple[str, Row]:
    """The table and the row of a name.

    Raises:
        ValueError: no table has that name; the message gives the nearest.
    """
    for title, table in TABLES.items():
        if name in table:
            return title, table[name]
    names = [name for table in TABLES.values() for name in table]
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown system {name!r}{hint} (`writehead systems` lists all {len(names)})")


def card(row: Row) -> tuple[str, dict[str, str]]:
    """The title and the fields of the card that the row's module docstring holds."""
    text = inspect.getdoc(import_module(f"writehead.{row.target.partition(':')[0]}")) or ""
    title = " ".join(text.partition("\n\n")[0].split())
    fields: dict[str, str] = {}
    last = None
    for line in text.splitlines():
        start = re.match(rf"({'|'.join(FIELDS)})\s+(\S.*)", line)
        if start:
            last = start[1]
            fields[last] = start[2]
        elif last and line.startswith(" "):
            fields[last] += " " + line.strip()
        else:
            last = None
    return title, fields


def arguments(row: Row) -> list[Argument]:
    """What a config may set, beside what the model itself supplies (dim, the position scheme, the layers)."""
    target = load(row)
    says = _says(inspect.getdoc(target.__init__) or "")
    supplied = {"dim", "vocab", "position", "layers"} | ({"head_dim"} if row.name in POSITIONS else set())
    found = []
    for name, parameter in inspect.signature(target).parameters.items():
        required = parameter.default is parameter.empty
        if name in supplied or (required and row.name in POSITIONS and name == "heads"):
            continue
        default = REQUIRED if required else parameter.default
        found.append(Argument(name, row.preset.get(name, default), says.get(name, "")))
    return found


def _says(docstring: str) -> dict[str, str]:
    """The entries under `Args:`."""
    section = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", section, re.MULTILINE)
    return {name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")}


def settings(given: Sequence[str]) -> dict[str, Any]:
    """`--set` options as arguments: "heads=4", "pattern.window=8", values in JSON or a plain word.

    Raises:
        typer.BadParameter: no "=" in an option, or a key that is both a value and a mapping.
    """
    values: dict[str, Any] = {}
    for one in given:
        key, equals, text = one.partition("=")
        *path, last = key.strip().split(".")
        if not equals or not last or not all(path):
            raise typer.BadParameter(f"--set takes KEY=VALUE, such as heads=4; got {one!r}")
        place = values
        for step in path:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(
                    f"--set {one!r} goes below {step!r}, which is already set to a value"
                )
        place[last] = _value(text.strip())
    return values


def over_preset(row: Row, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a row: one below an argument of its preset, such as pattern.window, changes that part."""
    return {key: _merged(row.preset.get(key), value) for key, value in given.items()}


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)) or "name" in new:
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def plain(value: Any) -> Any:
    """A value of an argument as JSON can hold it."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _value(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text
