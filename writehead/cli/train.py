"""`writehead train`: train a model on texts, labelled texts or pairs, and resume where it stopped."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from writehead.train.config import RunConfig


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A run as YAML or a preset such as etc-toy (default: a small model of Python's own sources);"
            " keys over it: optim.lr=0.1",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of checkpoints and logs.")] = None,
    resume: Annotated[
        str, typer.Option(help="never, auto (the newest checkpoint of DIR, if any), or a checkpoint.")
    ] = "never",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would cost; train nothing.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole run as YAML and stop.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Of torch; default a GPU if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
) -> None:
    """Train a model; with several processes under torchrun."""
    run = _run(arguments or [], out if resume != "never" else None)
    if print_config:
        from writehead.train.start import to_yaml

        typer.echo(to_yaml(run), nl=False)
        return
    if out is None and not dry_run:
        raise typer.BadParameter("--out DIR is needed: the folder of checkpoints and logs")
    import torch

    from writehead.core.system import cores

    torch.set_num_threads(threads or cores())
    if dry_run:
        _dry_run(run)
        return
    from writehead.train.start import begin

    assert out is not None
    with begin(run, out, resume=resume, device=device) as trainer:
        last = trainer.train()
        if trainer.team.first:
            typer.echo(str(last))


def _run(arguments: list[str], out: Path | None) -> "RunConfig":
    """The run that the arguments describe; one that is resumed without a CONFIG is the folder's own."""
    from writehead.presets import PRESETS
    from writehead.train.config import RunConfig
    from writehead.train.values import override, read_values

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise typer.BadParameter(f"{files[1]!r} is neither the only CONFIG nor key=value")
    if files:
        path = Path(files[0])
        if path.is_file():
            values = read_values(path)
        elif files[0] in PRESETS:
            values = PRESETS[files[0]].run
        else:
            raise typer.BadParameter(
                f"there is no config {files[0]!r}{_nearest(files[0], PRESETS)}; write overrides as key=value "
                f"(presets: {', '.join(PRESETS)})"
            )
    elif out is not None and (out / "run.yaml").is_file():
        values = read_values(out / "run.yaml")
    else:
        values = RunConfig().to_dict()
    return RunConfig.from_dict(override(values, [a for a in arguments if "=" in a]))


def _nearest(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _dry_run(run: "RunConfig") -> None:
    from writehead.cli.output import console, count, size
    from writehead.train.estimate import estimate

    found = estimate(run)
    rows = {
        "parameters": count(found.parameters),
        "weights, gradients, optimiser": size(found.fixed_bytes),
        "activations of a piece": size(found.activation_bytes),
        "memory, about": size(found.fixed_bytes + found.activation_bytes),
        "tokens a step": f"{found.tokens:,}",
        "operations a step": count(found.flops),
        "time a step": f"{found.step_s:.3g} s, measured on one piece and one update",
        "time of all steps": f"{found.step_s * run.loop.steps / 60:.3g} min of {run.loop.steps:,} steps",
        "passes over the data": f"{found.epochs:.3g}",
    }
    screen = console()
    for name, value in rows.items():
        screen.print(f"{name:32} {value}")
