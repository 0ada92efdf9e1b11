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


@command.command("kernels")
def kernels_command(
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of x; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each product.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for kernels.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """The native engine's matrix products in each format, beside memory's speed and PyTorch's products."""
    from writehead.bench import kernels
    from writehead.bench.measure import write_record
    from writehead.cli.output import console, print_json
    from writehead.cli.tables import kernels_table
    from writehead.core.system import cores

    threads = threads or cores()
    found = kernels.measure(rows=rows or kernels.ROWS, threads=threads, rounds=rounds, say=_say)
    _say("")
    if as_json:
        print_json(_plain({"threads": threads, "products": found}))
    else:
        console().print(kernels_table(found))
    if out is not None:
        write_record(out / "kernels.json", "kernels", found, {"rounds": rounds, "threads": threads})
        typer.echo(f"written: {out / 'kernels.json'}", err=True)


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


@command.command("quality")
def quality_command(
    text: Annotated[Path, typer.Argument(help="A text file, .gz or plain, such as WikiText's.")],
    model: Annotated[str, typer.Option(help="smollm2, a model folder or a FILE.gguf.")] = "smollm2",
    dtype: Annotated[list[str] | None, typer.Option(help="Types beside float32; default all.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to read at most.")] = 8192,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Agreement with float32 and perplexity of each type of weights, on the engine that `generate` uses."""
    import torch

    from writehead.bench.quality import compare, read_text, windows
    from writehead.cli.output import console, print_json
    from writehead.cli.tables import quality_table
    from writehead.core.system import cores
    from writehead.engines import open_engine

    torch.set_num_threads(threads or cores())
    names = ["float32", *(one for one in dtype or ("bfloat16", "int8", "int4") if one != "float32")]
    opened = {name: open_engine(model, dtype=name, threads=threads) for name in names}
    tokenizer = opened["float32"].tokenizer
    if tokenizer is None:
        raise ValueError(f"{opened['float32'].source} has no tokenizer, so it can read no text")
    texts = windows(tokenizer.encode(read_text(text)[: tokens * 8], bos=False)[:tokens], window)
    engines = {f"{one.engine.name} {name}": one.engine for name, one in opened.items()}
    found = compare(engines, texts, say=_say)
    _say("")
    if as_json:
        print_json({"model": model, "text": str(text), "qualities": [one.to_dict() for one in found]})
    else:
        console().print(quality_table(found))


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
