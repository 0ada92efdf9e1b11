"""The measurements of `writehead bench` about length and memory: crossovers, features, peers, toy tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from writehead.bench.crossover import Cell

OUT = "Folder of the results."


def crossover(
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms; default all.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="train, decode, memory, processor; repeat for several. Default all."),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=16, help="Lengths; default 256 to 65536.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("benchmarks/results"),
    name: Annotated[str, typer.Option(help="The record is crossover-NAME.json.")] = "all",
    page: Annotated[
        bool, typer.Option("--page", help="Measure nothing: print the page of the records, draw the plot.")
    ] = False,
) -> None:
    """From which length on each mechanism is faster than dense attention; slopes of time and memory."""
    import torch

    from writehead.bench import crossover as study
    from writehead.bench.crossover_page import crossover_plot, page_of, read
    from writehead.bench.measure import write_record
    from writehead.cli.output import say
    from writehead.core.shapes import check_choice
    from writehead.core.system import cores

    if page:
        cells = read(out)
        typer.echo(page_of(cells), nl=False)
        crossover_plot(cells, out / "crossover.png")
        return
    for each in names or ():
        check_choice("mechanism", each, study.SUBJECTS)
    for each in part or ():
        check_choice("part", each, study.PARTS)
    torch.set_num_threads(threads or cores())
    lengths, parts = sorted(tokens or study.LENGTHS), part or list(study.PARTS)
    written = out / f"crossover-{name}.json"
    found: list[Cell] = []

    def keep(cell: "Cell") -> None:
        found.append(cell)
        extra = {"width": study.WIDTH, "heads": 1, "threads": torch.get_num_threads()}
        write_record(written, "crossover", found, extra, seed=0)

    known = [
        cell for cell in read(out, without=written.name) if cell.name in (study.DENSE, study.DENSE_ENCODER)
    ]
    study.study(names or study.SUBJECTS, lengths, parts, known=known, keep=keep, say=say)
    typer.echo(f"written: {written}", err=True)


def features(
    part: Annotated[str, typer.Argument(help="estimate or peers.")],
    tokens: Annotated[int, typer.Option(min=16, help="peers only: length.")] = 16384,
    rounds: Annotated[int, typer.Option(min=1, help="peers only: samples of each.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("benchmarks/results"),
) -> None:
    """How well features estimate softmax, and causal linear attention beside other PyTorch code."""
    import torch

    from writehead.bench import feature_maps, linear_peers
    from writehead.bench.measure import write_record
    from writehead.cli.output import say
    from writehead.core.shapes import check_choice
    from writehead.core.system import cores

    check_choice("part", part, ("estimate", "peers"))
    torch.set_num_threads(threads or cores())
    torch.manual_seed(0)
    if part == "estimate":
        found = feature_maps.estimate()
        feature_maps.estimate_plot(found, out / "kernels-estimate.png")
        written = out / "kernels-estimate.json"
        write_record(written, "kernels estimate", found, seed=0)
    else:
        written = out / f"kernels-peers-{tokens}.json"
        results = linear_peers.peers(tokens, rounds, say)
        write_record(written, "kernels peers", results, {"tokens": tokens}, seed=0)
        for name, timing in results["seconds"].items():
            typer.echo(f"{name:48} {timing.error or f'{timing.median * 1e3:8.0f} ms'}")
    typer.echo(f"written: {written}", err=True)


def toys(
    out: Annotated[Path, typer.Option(help=OUT)] = Path("benchmarks/results"),
) -> None:
    """Associative recall and copying: learned by one layer of those that can, failed by those that cannot."""
    from writehead.bench import toys as tasks
    from writehead.bench.measure import write_record

    found: dict[str, dict[str, float]] = {task: {} for task in tasks.TASKS}
    for task, accuracies in found.items():
        for name, spec in {**tasks.LEARN, **tasks.CANNOT}.items():
            accuracies[name] = tasks.learn(spec, task)
            typer.echo(f"{task:8} {name:40} {accuracies[name]:.3f}")
    write_record(out / "toys.json", "toys", found, {"chance": 1 / tasks.SYMBOLS}, seed=0)


def segments(
    data: Annotated[Path, typer.Argument(help="A text, plain or gzip, such as tinyshakespeare.txt.gz.")],
    out: Annotated[Path, typer.Option(help=OUT)] = Path("benchmarks/results"),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of a run.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model.")] = 2,
    held_out: Annotated[int, typer.Option(min=1000, help="Characters to evaluate on.")] = 40000,
    only: Annotated[list[str] | None, typer.Option(help="Models; default all.")] = None,
) -> None:
    """Does memory help? Transformer-XL with and without it, and a Compressive Transformer, on one text."""
    import torch

    from writehead.bench import segment_memory
    from writehead.bench.measure import write_record
    from writehead.cli.output import say
    from writehead.core.shapes import check_choice

    for each in only or ():
        check_choice("model", each, segment_memory.CASES)
    torch.set_num_threads(1)  # products are too small for more
    text = segment_memory.read(data)
    found: list[dict[str, object]] = []
    about = {"data": data.name, **segment_memory.ABOUT, "steps": steps, "held_out": held_out}
    for row in segment_memory.study(text, only or list(segment_memory.CASES), steps, seeds, held_out, say):
        found.append(row)
        typer.echo(str(row))
        write_record(out / "transformer-xl-memory.json", "memory", found, about, seed=0)
