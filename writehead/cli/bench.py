"""`writehead bench`: measure this machine, our decoding, and other engines on the same weights."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from writehead.cli import growth, memory_studies, studies
from writehead.cli.start import start

if TYPE_CHECKING:
    from writehead.bench.decode import Run

command = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure this machine, decoding and training on it."
)
for study in (
    studies.train,
    studies.scaling,
    studies.evidence,
    studies.lsh,
    start,
    growth.crossover,
    growth.features,
    growth.toys,
    growth.segments,
    memory_studies.memory,
    memory_studies.million,
    memory_studies.duplication,
):
    command.command(study.__name__)(study)
QUICK = "float32, two cells, small grid, three rounds: under two minutes."
RANDOM = "random-1b"
MODEL = f"smollm2, a model folder, a FILE.gguf, or {RANDOM}: a Llama of a billion random weights."
DTYPE = "float32, bfloat16, int8, int4; repeat for several. Default all."
CELL = "BATCH@CONTEXT or prefill@TOKENS; repeat for several."
TEXT = "Judge each engine on this text, plain or gzip: agreement with float32, perplexity."


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
    part: Annotated[Literal["all", "products", "attention"], typer.Option(help="What is measured.")] = "all",
    out: Annotated[
        Path | None, typer.Option(help="Folder for kernels.json, kernels.png and kernels-attention.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """The native engine's products beside PyTorch's, its attention of one token, and what bounds them."""
    from writehead.bench import kernels, one_token
    from writehead.bench.measure import jsonable, write_record
    from writehead.cli.output import console, print_json, say
    from writehead.cli.tables import kernels_table, one_token_table
    from writehead.core.system import cores

    threads = threads or cores()
    found: list[kernels.Row] = []
    if part != "attention":
        found = kernels.measure(rows=rows or kernels.ROWS, threads=threads, rounds=rounds, say=say)
    tokens = [] if part == "products" else one_token.measure(threads=threads, rounds=rounds, say=say)
    say("")
    if as_json:
        print_json(jsonable({"threads": threads, "products": found, "attention": tokens}))
    else:
        if found:
            console().print(kernels_table(found))
        if tokens:
            console().print(one_token_table(tokens))
    if out is not None:
        extra = {"rounds": rounds, "threads": threads}
        if tokens:
            write_record(out / "kernels-attention.json", "kernels attention", tokens, extra)
            typer.echo(f"written: {out / 'kernels-attention.json'}", err=True)
        if found:
            from writehead.bench.plots import kernels_plot

            write_record(out / "kernels.json", "kernels", found, extra)
            kernels_plot(found, out / "kernels.png")
            typer.echo(f"written: {out / 'kernels.json'} and kernels.png", err=True)


@command.command("decode")
def decode_command(
    model: Annotated[str, typer.Option(help=MODEL)] = "smollm2",
    dtype: Annotated[list[str] | None, typer.Option(help=DTYPE)] = None,
    cell: Annotated[list[str] | None, typer.Option(help=CELL)] = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to judge by.")] = 4096,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also run the other engines that are installed.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Folder in which the files made for the peers stay; default none.")
    ] = None,
    peers_python: Annotated[str, typer.Option(help="The Python that has them.")] = sys.executable,
    only: Annotated[list[str] | None, typer.Option(help="Peers to run; default all.")] = None,
    busy: Annotated[bool, typer.Option("--busy", help="Also decode beside one busy core.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK)] = False,
    grid: Annotated[bool, typer.Option(help="Also measure the head-sharing grid.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each engine and cell.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.json, NAME.png and heads.png.")] = None,
    name: Annotated[str, typer.Option(help="NAME of these files.")] = "decode",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Decode and prefill speed in cells of batch and context, beside the roofline and beside peers."""
    import torch

    from writehead.bench import decode
    from writehead.bench.measure import jsonable
    from writehead.bench.peers import PEERS
    from writehead.cli.output import print_json, say
    from writehead.core.shapes import check_choice
    from writehead.core.system import cores

    kinds = dtype or (["float32"] if quick else list(decode.KINDS))
    for kind in kinds:
        check_choice("dtype", kind, decode.KINDS)
    for peer in only or ():
        check_choice("peer", peer, PEERS)
    cells = [decode.Cell.read(each) for each in cell or ()] or (
        [decode.Cell(1, 128), decode.Cell(0, 128)] if quick else list(decode.CELLS)
    )
    rounds = min(rounds, 3) if quick else rounds
    torch.set_num_threads(threads or cores())
    chosen = [each for each in PEERS if each in (only or PEERS)] if peers else []
    with tempfile.TemporaryDirectory(prefix="writehead-bench-") as folder:
        run, facts = _run(model, keep or Path(folder), chosen, peers_python, text, text_tokens)
        run = replace(run, kinds=kinds, cells=cells, rounds=rounds, threads=torch.get_num_threads())
        rows, judged, more = decode.measure(run, say)
        disturbed = decode.beside_busy(run, say) if busy else []
    results = {"decode": rows, "quality": judged, "beside_a_busy_core": disturbed}
    results |= _sharing(quick, rounds) if grid else {}
    say("")
    facts |= more
    if as_json:
        print_json(jsonable({"peers": facts, **results}))
    else:
        _print(results)
    if out is not None:
        extra = {"model": str(model), "rounds": rounds, "peers": facts}
        extra |= {"text": str(text) if text else None, "text_tokens": sum(map(len, run.text))}
        _write(out, name, results, extra)


def _sharing(quick: bool, rounds: int) -> dict[str, Any]:
    """What sharing key/value heads buys: one token's attention, and whole steps over batches and contexts."""
    from writehead.bench import attention, heads, plots
    from writehead.bench.machine import roofs
    from writehead.cli.output import say

    say("measuring the machine")
    limits = roofs()
    batches, contexts = ((1,), (128, 512)) if quick else ((1, 8), (512, 2048, 8192, 32768))
    cells = heads.grid(heads.SIXTEEN, batches, contexts, limits, rounds=min(rounds, 3), say=say)
    rows_of, cached = ((1,), (8192,)) if quick else ((1, 8), (8192, 32768))
    single = attention.one_token(rows_of, cached, limits, rounds=rounds, say=say)
    return {
        "roofs": limits,
        "attention": single,
        "heads": cells,
        "heads_of": heads.SIXTEEN.to_dict(),
        "one_write_head": plots.summary(cells),
    }


def _print(results: dict[str, Any]) -> None:
    from writehead.cli import tables
    from writehead.cli.output import console

    shown: dict[str, Any] = {
        "decode": tables.decode_table,
        "quality": tables.quality_table,
        "beside_a_busy_core": tables.beside_table,
        "attention": tables.attention_table,
        "heads": tables.heads_table,
    }
    for key, table in shown.items():
        if results.get(key):
            console().print(table(results[key]))


def _write(out: Path, name: str, results: dict[str, Any], extra: dict[str, Any]) -> None:
    from writehead.bench import plots
    from writehead.bench.measure import write_record

    write_record(out / f"{name}.json", "decode", results, extra)
    plots.decode_plot(results["decode"], out / f"{name}.png")
    if "heads" in results:
        plots.heads_plot(results["heads"], out / "heads.png")
    typer.echo(f"written: {out / f'{name}.json'} and its plots", err=True)


def _run(
    model: str, folder: Path, names: list[str], python: str, text: Path | None, text_tokens: int
) -> tuple["Run", dict[str, Any]]:
    """What is measured: the model, the peers that are installed, the text; and what peers are missing."""
    import torch

    from writehead.bench import decode
    from writehead.bench.peers import available, random_model, weights_of
    from writehead.bench.quality import WINDOW, read_text, windows
    from writehead.cli.output import say
    from writehead.convert.load import Loaded, load, open_checkpoint, read_tokenizer
    from writehead.core.system import available_memory
    from writehead.model.blank import blank
    from writehead.model.decoder import Decoder

    large = model == RANDOM
    if large:
        say("writing random weights")
        model = str(random_model(folder))
        checkpoint, gguf = open_checkpoint(Path(model), torch.float32)
        config, tokenizer = checkpoint.config, read_tokenizer(Path(model), gguf)
        loaded = Loaded(blank(config), tokenizer, config, Path(model))
    else:
        loaded = load(model, dtype=torch.float32, memory_bytes=available_memory())
    facts: dict[str, Any] = {}
    ready = []
    for name in names:
        found = available(name, python)
        facts[name] = found.version or found.reason
        ready += [name] if found.version else []
    pieces: list[list[int]] = []
    if text is not None:
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.source} has no tokenizer, so it can read no text")
        ids = loaded.tokenizer.encode(read_text(text, text_tokens * 8), bos=False)[:text_tokens]
        pieces = windows(ids, min(len(ids), WINDOW))
    weights = None
    if ready:
        say("writing the weights for the peers")
        directory = not {"transformers", "ctranslate2"}.isdisjoint(ready)
        weights = weights_of(loaded.source, folder, python, directory)
    if not isinstance(loaded.model, Decoder):
        raise ValueError(f"{loaded.source} is no decoder; bench decode measures decoders")
    source = loaded.source if large else None
    run = decode.Run(
        loaded.model, (), (), ready, python, weights=weights, folder=folder, text=pieces, source=source
    )
    return run, facts


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

    from writehead.bench.ours import Ours
    from writehead.bench.quality import judge, read_text, windows
    from writehead.cli.output import console, print_json, say
    from writehead.cli.tables import quality_table
    from writehead.core.system import cores
    from writehead.engines import open_engine

    torch.set_num_threads(threads or cores())
    names = ["float32", *(one for one in dtype or ("bfloat16", "int8", "int4") if one != "float32")]
    opened = {name: open_engine(model, dtype=name, threads=threads) for name in names}
    tokenizer = opened["float32"].tokenizer
    if tokenizer is None:
        raise ValueError(f"{opened['float32'].source} has no tokenizer, so it can read no text")
    texts = windows(tokenizer.encode(read_text(text, tokens * 8), bos=False)[:tokens], window)
    engines = {name: Ours(one.engine.name, one.engine) for name, one in opened.items()}
    say("float32 reads the text")
    reference = [engines["float32"].score(piece) for piece in texts]
    found = []
    for name, engine in engines.items():
        say(f"{name} reads the text")
        found.append(judge(engine, name, texts, reference))
    say("")
    if as_json:
        print_json({"model": model, "text": str(text), "qualities": [one.to_dict() for one in found]})
    else:
        console().print(quality_table(found))
