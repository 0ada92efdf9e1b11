"""The measurements of `writehead bench` that are of training's memory."""

from pathlib import Path
from typing import Annotated

import typer


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
