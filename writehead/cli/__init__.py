"""The command line: one file a verb, imported when the verb is run, so that help never waits for torch."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from writehead.cli import errors
from writehead.version import VERSION


class Verb(NamedTuple):
    """Where a verb lives: a function with typer's annotations, or a Typer of verbs below it."""

    target: str
    help: str


VERBS = {
    "demo": Verb(
        "writehead.cli.demo:command", "Decode the embedded model, and measure what head sharing buys."
    ),
    "generate": Verb("writehead.cli.generate:command", "Continue a prompt with a model, token by token."),
    "convert": Verb("writehead.cli.convert:command", "Write a model in another type: float, int8 or int4."),
    "train": Verb("writehead.cli.train:command", "Train a model on your text; resume after a crash."),
    "evaluate": Verb(
        "writehead.cli.evaluate:command", "Perplexity, accuracy, BLEU or bits per dimension of a model."
    ),
    "sample": Verb("writehead.cli.sample:command", "Draw images from a model of pixels."),
    "plan": Verb("writehead.cli.plan:command", "What a model costs: memory, bytes and time of a token."),
    "systems": Verb("writehead.cli.systems:command", "List every system of the catalog."),
    "show": Verb("writehead.cli.show:command", "Explain one system: its card, its costs, who sees whom."),
    "check": Verb("writehead.cli.check:command", "Test the laws on a system, or on a mixer of your own."),
    "bench": Verb("writehead.cli.bench:command", "Measure this machine and how fast models decode on it."),
}


class Verbs(TyperGroup):
    """The verbs by name; help reads the table above, only running a verb imports its file."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return verb and TyperCommand(cmd_name, help=verb.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in VERBS:
            near = get_close_matches(name, VERBS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"unknown verb {name!r}{hint} (accepted: {', '.join(VERBS)})")
        return name, load(name), args[1:]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise errors.Interrupted from None

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        given, debug = errors.take_debug(sys.argv[1:] if args is None else args)
        extra |= {"standalone_mode": False, "prog_name": "writehead"}
        errors.run(lambda: super(Verbs, self).main(given, *rest, **extra), debug)


def load(name: str) -> Any:
    """The verb's command, imported now."""
    verb = VERBS[name]
    module, _, attribute = verb.target.partition(":")
    target = getattr(import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name, help=verb.help)(target)
        target = alone
    return typer.main.get_command(target)


app = typer.Typer(cls=Verbs, add_completion=False, invoke_without_command=True)


@app.callback(help="Choose a cheap attention, train with it, convert a model to it, decode with it.")
def start(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (with any verb)."),
) -> None:
    """Answer what needs no verb."""
    if version:
        typer.echo(f"writehead {VERSION}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The console script."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch puts large tensors on huge pages, on Linux
    app(prog_name="writehead")
