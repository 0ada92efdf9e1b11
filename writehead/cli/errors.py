"""How a command ends when it cannot do its work: one line on stderr and an exit code."""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

FAILED, USAGE, INTERRUPTED = 1, 2, 130
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no public name for it


class Interrupted(Exception):
    """Ctrl-C, under a name of ours: typer would turn a KeyboardInterrupt into a silent exit."""


def take_debug(args: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, which may stand before or behind the verb, and was it there?"""
    end = args.index("--") if "--" in args else len(args)
    return [*(a for a in args[:end] if a != "--debug"), *args[end:]], "--debug" in args[:end]


def run(body: Callable[[], Any], debug: bool) -> NoReturn:
    """Run a command line and leave the process with its exit code."""
    try:
        code = body()
        sys.stdout.flush()  # a closed pipe shows here, not when the interpreter shuts down
    except BrokenPipeError:
        _leave_closed_pipe()
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED, debug)
    except UsageError as error:
        _fail(_usage(error), USAGE, debug)
    except Exception as error:
        _fail(describe(error), FAILED, debug)
    sys.exit(code if isinstance(code, int) else 0)


def describe(error: BaseException) -> str:
    """One sentence for what went wrong; an exception that is no answer to bad input is marked as internal."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory ({text or 'the system has no more to give'})"
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"internal: {type(error).__name__}: {text} (run again with --debug for the traceback)"


def _usage(error: Exception) -> str:
    formatted: str = error.format_message()  # type: ignore[attr-defined]
    text = " ".join(formatted.split()).replace("(Possible options:", "(did you mean:")
    text = text.replace(": Value error, ", ": ")  # what pydantic puts before a sentence of its own
    context = getattr(error, "ctx", None)
    where = f"; see {context.command_path} --help" if context is not None else ""
    return text.rstrip(".") + where


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _leave_closed_pipe()
    sys.exit(code)


def _leave_closed_pipe() -> NoReturn:
    """Leave without a word: whoever read the output has seen enough."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.close()
        except BrokenPipeError:
            continue
    sys.exit(FAILED)
