"""`writehead check`: the laws on a system of the catalog, on all of them, or on a mixer of the user's own."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from writehead.laws import Verdict


def command(
    name: Annotated[str | None, typer.Argument(help="A mixer of the catalog.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every mixer of the catalog.")] = False,
    module: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:CLASS", help="A mixer of your own; the folder you are in counts."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An argument of your mixer, such as dim=16; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from writehead.bench.machine import torch_threads
    from writehead.cli.cards import settings
    from writehead.cli.output import print_json

    if (name is not None) + everything + (module is not None) != 1:
        raise typer.BadParameter("give one of NAME, --all and --module PKG.MOD:CLASS")
    if set_ and module is None:
        raise typer.BadParameter(
            "--set is for --module; systems of the catalog are checked at a size of their own"
        )
    with torch_threads(1):  # the mixers are tiny: a second thread only makes them wait
        verdicts = own(module, settings(set_ or [])) if module is not None else ours(name)
        done = list(verdicts) if as_json else _print(verdicts)
    if as_json:
        print_json([asdict(verdict) for verdict in done])
    if not all(verdict.passed for verdict in done):
        raise typer.Exit(1)


def ours(name: str | None) -> Iterator["Verdict"]:
    """The verdicts on one mixer of the catalog, or on all, one after the other.

    Raises:
        ValueError: no such mixer.
    """
    from writehead.catalog import MIXERS, find
    from writehead.laws import check_row

    for row in MIXERS.values() if name is None else [find(MIXERS, name)]:
        yield from check_row(row)


def own(target: str, given: Mapping[str, Any]) -> Iterator["Verdict"]:
    """The verdicts on a class of the user's, built with `given`; `dim` is also the width that the laws use.

    Raises:
        ValueError: no such class, arguments that it does not take, or a class that is no mixer.
    """
    from writehead.laws import DECODING, DIM, ENCODING, check

    kind = _imported(target)
    takes = inspect.signature(kind).parameters
    arguments = {**({"dim": DIM} if "dim" in takes else {}), **given}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{target}: {error} (it takes {', '.join(takes) or 'nothing'}; see --set)") from None
    mixer = kind(**arguments)
    laws = DECODING if hasattr(mixer, "init_state") or hasattr(mixer, "remember") else ()
    laws += ENCODING if hasattr(mixer, "encode") else ()
    if not laws:
        raise ValueError(f"{target} is no mixer: it has neither init_state and forward, nor encode")
    for law in laws:
        yield check(mixer, law, dim=arguments.get("dim", DIM))


def _imported(target: str) -> Any:
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise typer.BadParameter(f"--module takes PKG.MOD:CLASS; got {target!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = import_module(module)
    except Exception as error:
        raise ValueError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    kind = getattr(found, name, None)
    if not isinstance(kind, type):
        classes = [key for key, v in vars(found).items() if isinstance(v, type) and v.__module__ == module]
        raise ValueError(f"{module} has no class {name!r} (it has {', '.join(classes) or 'none'})")
    return kind


def _print(verdicts: Iterator["Verdict"]) -> list["Verdict"]:
    from rich.text import Text

    from writehead.cli.output import console

    screen, done, row = console(), [], None
    for verdict in verdicts:
        if verdict.row != row:
            row = verdict.row
            screen.print(row, style="bold")
        line = Text("  ").append(*(("holds ", "green") if verdict.passed else ("BROKEN", "bold red")))
        number = "-" if verdict.deviation is None else f"{verdict.deviation:.1e}"
        screen.print(line.append(f"  {verdict.law:<15} {number:>8}"))
        if not verdict.passed:
            screen.print(f"          {verdict.detail}", soft_wrap=True)
        done.append(verdict)
    broken = sum(not verdict.passed for verdict in done)
    held = f"{len(done) - broken} of {len(done)} laws hold"
    screen.print(f"{held}; the figure is the worst deviation, relative, in float64")
    return done
