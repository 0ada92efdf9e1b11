"""The measurements of `writehead bench` that are not of decoding: training, growth with length, evidence."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each case.")] = 5,
    dim: Annotated[int, typer.Option(min=8, help="Width of the models.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for training.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """A training step of ours beside PyTorch's own layers and transformers' Trainer."""
    from dataclasses import asdict

    import torch

    from writehead.bench.measure import jsonable, write_record
    from writehead.bench.training import Shape, compare
    from writehead.cli.output import console, print_json, say, table
    from writehead.core.system import cores

    torch.set_num_threads(threads or cores())
    shape = Shape(dim=dim, hidden=4 * dim, batch=batch, length=length)
    found = compare(shape, rounds, say)
    say("")
    if as_json:
        print_json({"shape": asdict(shape), "cases": jsonable(found)})
    else:
        grid = table("a training step", "ms", "quartiles", "tokens/s")
        for name, t in found.items():
            quartiles = f"{t.q1 * 1e3:.0f} to {t.q3 * 1e3:.0f}"
            speed = f"{batch * length / t.median:,.0f}"
            grid.add_row(
                name, *([f"{t.median * 1e3:.0f}", quartiles, speed] if not t.error else [t.error, "", ""])
            )
        console().print(grid)
    if out is not None:
        write_record(out / "training.json", "training", found, {"shape": asdict(shape), "rounds": rounds})
        typer.echo(f"written: {out / 'training.json'}", err=True)


def evidence(
    experiments: Annotated[list[str] | None, typer.Argument(help="lm, alibi; default all.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with WikiText-2; without it Python's own sources are used.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of records, runs and tables.")] = Path("docs/evidence"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of a run.")] = 1200,
    dim: Annotated[int, typer.Option(min=8, help="Width of the models, a multiple of 8.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
) -> None:
    """Run the experiments that check the papers' claims, piece by piece; what was stopped goes on."""
    import torch

    from writehead.bench import evidence
    from writehead.cli.output import say
    from writehead.convert.files import replacing
    from writehead.core.system import cores

    torch.set_num_threads(threads or cores())
    section, said = evidence.sources(data)
    names = experiments or list(evidence.EXPERIMENTS)
    todo = evidence.pieces(names, section, evidence.Scale(dim=dim, steps=steps, seeds=seeds))
    say(said)
    evidence.work(todo, out, say)
    for name in names:
        text = evidence.table(evidence.of(todo, out), name)
        with replacing(out / f"{name}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        typer.echo(text)


def scaling(
    only: Annotated[list[str] | None, typer.Option(help="Subjects to run; repeat for several.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=16, help="Lengths; default 4096 16384 65536.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each cell; the fastest counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for scaling.json and scaling.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Time and memory of one attention layer against the length, with the slopes of their curves."""
    from writehead.bench import scaling
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import console, print_json, say
    from writehead.cli.tables import scaling_table
    from writehead.core.shapes import check_choice

    for name in only or ():
        check_choice("subject", name, scaling.SUBJECTS)
    lengths = sorted(tokens or (4096, 16384, 65536))
    cells = scaling.scaling(
        only or scaling.SUBJECTS,
        lengths,
        heads=heads,
        head_dim=head_dim,
        threads=threads,
        rounds=rounds,
        say=say,
    )
    say("")
    results = {"cells": cells, "slopes": scaling.slopes(cells)}
    if as_json:
        print_json(jsonable(results))
    else:
        console().print(scaling_table(cells))
    if out is not None:
        shape = {"heads": heads, "head_dim": head_dim, "threads": threads, "rounds": rounds}
        write_record(out / "scaling.json", "scaling", results, shape, seed=0)
        scaling.scaling_plot(cells, out / "scaling.png")
        typer.echo(f"written: {out / 'scaling.json'} and its plot", err=True)


def lsh(
    tokens: Annotated[
        list[int] | None, typer.Option(min=256, help="Lengths of our layer; default 4096 16384 65536.")
    ] = None,
    beside: Annotated[
        int, typer.Option(min=256, help="Length of the comparison with other packages.")
    ] = 16384,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each case.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for lsh.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """LSH attention by length, beside other packages' layers and dense attention; what reversing costs."""
    import torch

    from writehead.bench import lsh as bench
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import print_json
    from writehead.core.system import cores

    torch.set_num_threads(threads or cores())
    found = bench.measure(sorted(tokens or (4096, 16384, bench.LONGEST)), beside, rounds)
    if as_json:
        print_json(jsonable(found))
    else:
        for line in bench.lines(found):
            typer.echo(line)
    if out is not None:
        shape = {
            "dim": bench.DIM,
            "heads": bench.HEADS,
            "chunk": bench.CHUNK,
            "rounds of hashes": bench.ROUNDS,
        }
        write_record(out / "lsh.json", "lsh", found, {**shape, "threads": threads or cores()}, seed=0)
        typer.echo(f"written: {out / 'lsh.json'}", err=True)
