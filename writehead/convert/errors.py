"""The one error of every file that cannot be used, and the helpers that keep its message short."""

import stat
from pathlib import Path


class BadFile(ValueError):
    """A file that cannot be used; the message names the file, what is wrong and what was expected."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(str(path), problem)
        self.path, self.problem = str(path), problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def shown(value: object, limit: int = 80) -> str:
    """A printable form of something read from a file, at most `limit` characters of it."""
    if isinstance(value, str | bytes | list):
        value = value[: limit + 1]
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def file_size(path: Path) -> int:
    """Bytes in a regular file.

    Raises:
        BadFile: there is no such file, it may not be read, or it is a folder or a device.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise BadFile(path, (error.strerror or "cannot be read").lower()) from error
    except ValueError as error:
        raise BadFile(shown(str(path)), "is not a file name") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(path, "is not a regular file; give a file")
    return status.st_size
