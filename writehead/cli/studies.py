"""The measurements of `writehead bench` that are not of decoding: training, growth with length, evidence."""

from pathlib import Path
from typing import Annotated

import typer

PEERS = (
    "A training step at 16384 tokens beside dense attention, transformers' Longformer and local-attention."
)
MODEL = "A training step of a whole model at 65536 tokens: 4 layers, width 256, a window of 256."


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
    experiments: Annotated[
        list[str] | None, typer.Argument(help="translation, lm, alibi, speed; default all.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with WikiText-2 and Multi30k; what is missing is said.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of records, tables and plots.")] = Path("docs/evidence"),
    runs: Annotated[Path | None, typer.Option(help="Folder of the runs; default OUT/runs.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each variant; default 3, of translation 1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of a run.")] = None,
    dim: Annotated[int | None, typer.Option(min=8, help="Width of the models, a multiple of 8.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    pages: Annotated[bool, typer.Option("--pages", help="Only write tables and plots anew.")] = False,
) -> None:
    """Run the experiments that check the papers' claims, piece by piece; what was stopped goes on."""
    import torch

    from writehead.bench import evidence, evidence_pages, translation_speed
    from writehead.bench.experiments import EXPERIMENTS, pieces, sources
    from writehead.cli.output import say
    from writehead.core.shapes import check_choice
    from writehead.core.system import cores

    torch.set_num_threads(threads or cores())
    for name in experiments or ():
        check_choice("experiment", name, (*EXPERIMENTS, "speed"))
    names = experiments or [*EXPERIMENTS, "speed"]
    found = sources(data)
    for line in found.said:
        say(line)
    given = {"seeds": seeds, "steps": steps, "dim": dim}
    scale = {name: value for name, value in given.items() if value is not None}
    planned = pieces(list(EXPERIMENTS), found, **scale)
    todo = [] if pages else pieces([name for name in names if name in EXPERIMENTS], found, **scale)

    if pages and (others := evidence.others(planned, out)):
        raise ValueError(
            f"{others} of the records in {out} belong to runs that these options do not plan, and the page "
            "would lack them: give the --data, --seeds, --steps and --dim that they had"
        )

    def write() -> None:
        evidence_pages.write(planned, out, found.said)

    if "speed" in names and not pages and translation_speed.read_speed(out) is None:
        shape = translation_speed.Shape()
        translation_speed.write_speed(translation_speed.measure(shape, say=say), shape, out)
        write()
    evidence.work(todo, out, runs or out / "runs", say, write)
    write()
    typer.echo(f"written: {out / 'README.md'} and its plots", err=True)


def scaling(
    only: Annotated[list[str] | None, typer.Option(help="Subjects to run; repeat for several.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=16, help="Lengths; default 4096 16384 65536.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each cell; the fastest counts.")] = 3,
    peers: Annotated[bool, typer.Option("--peers", help=PEERS)] = False,
    model: Annotated[bool, typer.Option("--model", help=MODEL)] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.json and NAME.png.")] = None,
    name: Annotated[
        str | None, typer.Option(help="NAME of these files; default says what is in them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Time and memory of one attention layer against the length, with the slopes of their curves."""
    if peers or model:
        if peers and model:
            raise ValueError("--peers and --model are two measurements: ask for one")
        _long_training(peers, only, tokens, heads, head_dim, threads, rounds, out, name, as_json)
        return
    from writehead.bench import scaling
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import console, print_json, say
    from writehead.cli.tables import scaling_table
    from writehead.core.shapes import check_choice

    for subject in only or ():
        check_choice("subject", subject, scaling.SUBJECTS)
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
        path = out / f"{name or 'scaling'}.json"
        write_record(path, "scaling", results, shape, seed=0)
        scaling.scaling_plot(cells, path.with_suffix(".png"))
        typer.echo(f"written: {path} and its plot", err=True)


def _long_training(
    peers: bool,
    only: list[str] | None,
    tokens: list[int] | None,
    heads: int,
    head_dim: int,
    threads: int,
    rounds: int,
    out: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Training steps on one long row: layers beside peers, or whole models."""
    from writehead.bench import long_training
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import console, print_json, say
    from writehead.cli.tables import long_table
    from writehead.core.shapes import check_choice

    if len(tokens or ()) > 1:
        raise ValueError(f"--peers and --model measure at one length; got --tokens {tokens}")
    for chosen in only or ():
        check_choice("layer", chosen, long_training.LAYERS)
    length = tokens[0] if tokens else 1 << (14 if peers else 16)
    facts = {"tokens": length, "threads": threads}
    if peers:
        shape = {"heads": heads, "head_dim": head_dim, "rounds": rounds}
        cells = long_training.beside_peers(
            only or long_training.LAYERS, length, **shape, threads=threads, say=say
        )
        facts |= shape
    else:
        if only:
            raise ValueError(f"--only chooses among layers; --model measures its two models, got {only}")
        cells = long_training.models(length, threads=threads, say=say)
    results = {"cells": cells, "times_ours": long_training.ratios(cells)} if peers else {"cells": cells}
    say("")
    if as_json:
        print_json(jsonable(results))
    else:
        console().print(long_table(cells))
    if out is not None:
        path = out / f"{name or ('scaling-peers' if peers else 'scaling-model')}.json"
        write_record(path, "scaling", results, facts, seed=0)
        typer.echo(f"written: {path}", err=True)


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
