"""JSON as model folders use it: one object, bounded, every key once."""

import json
from pathlib import Path
from typing import Any, NoReturn

from writehead.convert.errors import BadFile, file_size, shown

MAX_JSON_BYTES = 16 * 2**20


def parse_json(data: bytes, path: Path, what: str = "the file") -> dict[str, Any]:
    """One JSON object from UTF-8 bytes; a key given twice, NaN or any other value is refused.

    Args:
        data: the whole text.
        path: the file to name in an error.
        what: the part of that file, for the error's first words.

    Raises:
        BadFile: the text is not one JSON object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadFile(path, f"{what} gives the key {shown(twice)} twice in one object; each may stand once")

    def no_constant(name: str) -> NoReturn:
        raise BadFile(path, f"{what} holds {name}, which is not JSON; expected a finite number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except BadFile:
        raise
    except UnicodeDecodeError as error:
        raise BadFile(path, f"{what} is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise BadFile(path, f"{what} nests lists or objects too deeply") from error
    except ValueError as error:
        raise BadFile(path, f"{what} is not JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise BadFile(path, f"{what} holds a {type(value).__name__}; expected one JSON object")
    return value


def read_json(path: Path | str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        max_bytes: a larger file is refused unread.

    Raises:
        BadFile: missing, too large, not UTF-8, not JSON, not an object, or a key given twice.
    """
    path = Path(path)
    size = file_size(path)
    if size > max_bytes:
        raise BadFile(path, f"is {size} bytes; a JSON file here may have at most {max_bytes}")
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise BadFile(path, (error.strerror or "cannot be read").lower()) from error
