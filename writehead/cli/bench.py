"""`writehead bench`: measure this machine, our decoding, and other engines on the same weights."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

command = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure this machine and decoding on it."
)
QUICK = "Two cells, small grid, three rounds: under two minutes."


@command.callback()
def group() -> None:
    """Measure; every figure stands beside this machine's roofline."""


@command.command("machine")
def machine_command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """What this machine is, how fast it reads memory and how fast it multiplies."""
    from writehead.bench.machine import machine, roofs
    from writehead.cli.output import print_json, size

    found, limits = machine(), roofs()
    if as_json:
        print_json({"machine": found, "roofs": limits.to_dict()})
        return
    for key in ("cpu", "cores", "memory_bytes", "torch", "writehead", "commit"):
        if found.get(key) is not None:
            typer.echo(f"{key:14} {found[key]}")
    for held, rate in limits.bandwidth.items():
        typer.echo(f"read {size(held):>9} {rate / 1e9:8.1f} GB/s")
    for kind, rates in limits.matmul.items():
        typer.echo(f"{kind:14} {max(rates.values()) / 1e9:8.0f} GFLOP/s")


@command.command("decode")
def decode_command(
    model: Annotated[str, typer.Option(help="smollm2, a model folder or a FILE.gguf.")] = "smollm2",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; repeat for several.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also run the other engines that are installed.")
    ] = False,
    peers_python: Annotated[str, typer.Option(help="The Python that has them.")] = sys.executable,
    only: Annotated[list[str] | None, typer.Option(help="Peers to run; default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK)] = False,
    grid: Annotated[bool, typer.Option(help="Also measure the head-sharing grid.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each engine and cell.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for decode.json, decode.png and heads.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Decode and prefill speed in cells of batch and context, beside the roofline and beside peers."""
    import torch

    from writehead.bench import attention, decode, heads, plots
    from writehead.bench.machine import roofs
    from writehead.bench.measure import write_record
    from writehead.bench.peers import PEERS
    from writehead.cli.output import console, print_json
    from writehead.cli.tables import attention_table, decode_table, heads_table
    from writehead.convert.load import load
    from writehead.core.shapes import check_choice
    from writehead.core.system import available_memory, cores

    kinds = dtype or ["float32", "bfloat16"]
    for kind in kinds:
        check_choice("dtype", kind, ("float32", "bfloat16"))
    for name in only or ():
        check_choice("peer", name, PEERS)
    torch.set_num_threads(threads or cores())
    say = _say
    say("measuring the machine")
    limits = roofs(torch.get_num_threads())
    loaded = {
        getattr(torch, kind): load(model, dtype=getattr(torch, kind), memory_bytes=available_memory())
        for kind in kinds
    }
    models: dict[torch.dtype, Any] = {kind: each.model for kind, each in loaded.items()}
    cells = (decode.Cell(1, 128), decode.Cell(0, 128)) if quick else decode.CELLS
    rounds = min(rounds, 3) if quick else rounds
    chosen = [name for name in PEERS if name in (only or PEERS)] if peers else []
    source = next(iter(loaded.values())).source
    with tempfile.TemporaryDirectory(prefix="writehead-bench-") as folder:
        rows, facts = _decode(models, chosen, peers_python, source, Path(folder), cells, limits, rounds, say)
    shared = []
    if grid:
        config = heads.SIXTEEN
        batches, contexts = ((1,), (128, 512)) if quick else ((1, 8), (512, 2048, 8192))
        shared = heads.grid(config, batches, contexts, limits, rounds=min(rounds, 3), say=say)
    rows_of, cached = ((1,), (8192,)) if quick else ((1, 8), (8192, 32768))
    single = attention.one_token(rows_of, cached, limits, rounds=rounds, say=say)
    say("")
    results = {
        "roofs": limits,
        "decode": rows,
        "attention": single,
        "heads": shared,
        "one_write_head": plots.summary(shared),
    }
    if as_json:
        print_json(_plain({"peers": facts, **results}))
    else:
        console().print(decode_table(rows))
        console().print(attention_table(single))
        if shared:
            console().print(heads_table(shared))
    if out is not None:
        extra = {"model": str(model), "rounds": rounds, "peers": facts, "grid": heads.SIXTEEN.to_dict()}
        write_record(out / "decode.json", "decode", results, extra)
        plots.decode_plot(rows, out / "decode.png")
        if shared:
            plots.heads_plot(shared, out / "heads.png")
        typer.echo(f"written: {out / 'decode.json'} and its plots", err=True)


@command.command("scaling")
def scaling_command(
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
    from writehead.bench.measure import write_record
    from writehead.cli.output import console, print_json
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
        say=_say,
    )
    _say("")
    results = {"cells": cells, "slopes": scaling.slopes(cells)}
    if as_json:
        print_json(_plain(results))
    else:
        console().print(scaling_table(cells))
    if out is not None:
        shape = {"heads": heads, "head_dim": head_dim, "threads": threads, "rounds": rounds}
        write_record(out / "scaling.json", "scaling", results, shape, seed=0)
        scaling.scaling_plot(cells, out / "scaling.png")
        typer.echo(f"written: {out / 'scaling.json'} and its plot", err=True)


def _decode(
    models: Any,
    names: Any,
    python: str,
    source: Path,
    folder: Path,
    cells: Any,
    limits: Any,
    rounds: int,
    say: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """Rows of all engines, and facts of the peers: those that are not installed are named with the reason."""
    from writehead.bench import decode
    from writehead.bench.peers import available, weights_of

    facts: dict[str, Any] = {}
    ready = []
    for name in names:
        found = available(name, python)
        facts[name] = found.version or found.reason
        if found.version:
            ready.append(name)
    if not ready:
        rows = [
            r
            for kind, m in models.items()
            for r in decode.compare(m, kind, cells, limits, rounds=rounds, say=say)
        ]
        return rows, facts
    say("writing the weights for the peers")
    weights = weights_of(source, folder, python)
    rows, more = decode.with_peers(
        models, weights, folder, ready, python, cells, limits, rounds=rounds, say=say
    )
    return rows, facts | more


def _say(text: str) -> None:
    """Progress, on one line of a terminal's stderr, or a line each in a log."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _plain(value: Any) -> Any:
    import json

    from writehead.bench.measure import _jsonable

    return json.loads(json.dumps(_jsonable(value)))
