"""The measurements of `writehead bench` that are of training's memory."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from writehead.bench.memory import Cell, Fit


def million(
    text: Annotated[list[Path], typer.Argument(help="Documents, plain or gzip, joined in this order.")],
    tokens: Annotated[int, typer.Option(min=16, help="Bytes of the sequence.")] = 1 << 20,
    new: Annotated[int, typer.Option(min=1, help="Tokens decoded behind it.")] = 1000,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for million.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """A training step on a million bytes of text, then tokens decoded behind them."""
    from dataclasses import asdict

    import torch

    from writehead.bench import million
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import print_json, say
    from writehead.core.system import cores

    threads = threads or cores()
    torch.set_num_threads(threads)
    shape = million.Shape()
    facts = {"shape": asdict(shape), "threads": threads, "text": [path.name for path in text], "new": new}

    def note(result: million.Result) -> None:
        if out is not None:
            write_record(out / "million.json", "million", result, facts, seed=0)

    result = million.run(text, tokens, new=new, say=say, note=note)
    say("")
    if as_json:
        print_json(jsonable(result))
        return
    step_s = result.forward_s + result.backward_s + result.update_s
    typer.echo(f"{tokens:,} tokens, {result.parameters:,} parameters")
    typer.echo(f"step: {step_s:.0f} s, {result.step_bytes / 1e9:.2f} GB, loss {result.loss:.4f} nats a byte")
    typer.echo(f"after it: {result.loss_after:.4f}; decode state {result.state_bytes / 1e6:,.0f} MB")
    for before, (_, median, _) in result.token_ms.items():
        typer.echo(f"a token behind {before:,}: {median:.1f} ms")


def memory(
    studies: Annotated[
        list[str] | None, typer.Argument(help="accuracy, depth, bert, bert-small; default all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for memory-STUDY.json and the plot.")] = None,
    budget: Annotated[str, typer.Option(metavar="SIZE", help="Of the study bert.")] = "12GB",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """The peak of a training step: predicted beside measured, over depth, and the largest batches of BERT."""
    from writehead.bench import memory
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import console, print_json, say
    from writehead.cli.plan_training import bytes_of
    from writehead.core.shapes import check_choice

    limit = bytes_of(budget)
    known: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: memory.accuracy(say),
        "depth": lambda: memory.depth(say=say),
        "bert": lambda: memory.bert_table(limit, say=say),
        "bert-small": lambda: memory.bert_small(say=say),
    }
    for name in studies or ():
        check_choice("study", name, known)
    results: dict[str, Any] = {}
    for name in studies or known:
        results[name] = known[name]()
        facts = {"budget": limit} if name == "bert" else {}
        if out is not None:
            write_record(out / f"memory-{name}.json", f"memory-{name}", results[name], facts, seed=0)
            if name == "depth":
                memory.depth_plot(results[name], out / "memory-depth.png")
            typer.echo(f"written: {out / f'memory-{name}.json'}", err=True)
        if not as_json:
            say("")
            console().print(_table(results[name]))
    if as_json:
        print_json(jsonable(results))


def _table(found: "list[Cell] | list[Fit]") -> "Table":
    """Cells beside their predictions, or the largest batches by length beside the published ones."""
    from writehead.bench.memory import BERT_LENGTHS, PUBLISHED, Cell
    from writehead.cli.output import size, table

    cells = [one if isinstance(one, Cell) else one.measured for one in found]
    if any(cells):
        grid = table("model", "plan", "layers", "step", "predicted", "tensors", "off", "process", "s a step")
        for cell in cells:
            if cell is not None:
                step = f"{cell.batch} x {cell.length}"
                grid.add_row(
                    cell.name, cell.plan, str(cell.depth), step, size(cell.predicted),
                    *((cell.error, "", "", "") if cell.error else
                      (size(cell.tensors), f"{cell.off:+.1%}", size(cell.resident), f"{cell.step_s:.3g}")),
                )  # fmt: skip
        return grid
    fits = [one for one in found if not isinstance(one, Cell)]
    lengths = sorted({fit.length for fit in fits})
    grid = table("largest batch", *(f"{length} tokens" for length in lengths))
    published = dict(zip(BERT_LENGTHS, PUBLISHED, strict=True))
    grid.add_row("published (12 GB card)", *(str(published.get(length, "")) for length in lengths))
    for plan in dict.fromkeys(fit.plan for fit in fits):
        batches = {fit.length: str(fit.batch) for fit in fits if fit.plan == plan}
        grid.add_row(plan, *(batches.get(length, "") for length in lengths))
    return grid


def duplication(
    word: Annotated[int, typer.Option(min=1, help="Symbols of w; a sequence is 0 w 0 w.")] = 15,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each training.")] = 1500,
    out: Annotated[Path | None, typer.Option(help="Folder for duplication.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """The Reformer's duplication task: trained with some rounds of hashing, judged with others."""
    from dataclasses import asdict

    import torch

    from writehead.bench import duplication
    from writehead.bench.measure import write_record
    from writehead.cli.output import print_json, say

    torch.set_num_threads(1)
    task = duplication.Task(word=word, steps=steps)
    found = duplication.table(task, say=say)
    say("")
    if as_json:
        print_json(found)
    else:
        typer.echo(duplication.markdown(found))
    if out is not None:
        write_record(out / "duplication.json", "duplication", found, asdict(task), seed=task.seed)
        typer.echo(f"written: {out / 'duplication.json'}", err=True)
