"""`writehead demo`: the main job on the embedded model: decode it, see how fast and why, see what head
sharing buys."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from writehead.cli.tables import Answer
    from writehead.config import ModelConfig
    from writehead.engines import Opened

PROMPT = "In two sentences, why do language models slow down as the conversation gets longer?"
OTHERS = (("native", "int8"), ("native", "int4"), ("torch", "float32"))  # what is measured beside the first


def command(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = PROMPT,
    model: Annotated[str, typer.Option(help="smollm2, a model folder or a FILE.gguf.")] = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of the answer at most.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("out"),
) -> None:
    """Stream an answer, report its speed against this machine's limit, then measure what sharing heads
    buys."""
    import torch

    from writehead.bench import heads, plots
    from writehead.bench.machine import roofs
    from writehead.cli.output import console
    from writehead.cli.tables import answers_table, heads_table
    from writehead.core.system import cores

    torch.set_num_threads(cores())
    limits = roofs(torch.get_num_threads(), 2**29)
    answers, shape = _answers(model, prompt, max_new_tokens)
    console().print(answers_table(answers, limits))
    typer.echo("\nThe same model shape with all, some and one key/value head (random weights, PyTorch):")
    torch.set_num_threads(cores())
    cells = heads.grid(shape, (1, 8), (256, 2048), limits, rounds=3, steps=3, say=lambda text: None)
    console().print(heads_table(cells))
    best = plots.summary(cells)
    typer.echo(
        f"One write-head decodes up to {best['times']:.1f}x as fast as multi-head here "
        f"(batch {best['batch']}, context {best['context']}; predicted {best['predicted']:.1f}x)."
    )
    try:
        plots.heads_plot(cells, out / "heads.png")
    except ValueError as error:
        typer.echo(str(error), err=True)
    else:
        typer.echo(f"Plot: {out / 'heads.png'}. Next: writehead generate --help, writehead plan smollm2")


def _answers(model: str, prompt: str, max_new_tokens: int) -> tuple[list["Answer"], "ModelConfig"]:
    """One answer on the screen, then the speed of the same with other weights and without our engine."""
    typer.echo(f"> {prompt}\n")
    first, opened = _answer(model, prompt, max_new_tokens, "auto", "float32", aloud=True)
    typer.echo(f"\n\nthe {opened.engine.name} engine: {opened.why}")
    others = OTHERS if opened.engine.name == "native" else ()
    return [first, *(_answer(model, prompt, max_new_tokens, *run)[0] for run in others)], opened.config


def _answer(
    model: str, prompt: str, max_new_tokens: int, engine: str, dtype: str, aloud: bool = False
) -> tuple["Answer", "Opened"]:
    import torch

    from writehead.cli.tables import Answer
    from writehead.core.system import available_memory, cores
    from writehead.decode.generate import stream
    from writehead.engines import open_engine

    opened = open_engine(model, engine=engine, dtype=dtype, memory_bytes=available_memory())
    if opened.tokenizer is None:
        raise ValueError(f"{opened.source} has no tokenizer, so it can read no text")
    # torch's own threads would fight with the native engine's
    torch.set_num_threads(1 if opened.engine.name == "native" else cores())
    text = opened.tokenizer.chat([{"role": "user", "content": prompt}])
    ids = opened.tokenizer.encode(text, bos=False)
    run = stream(opened.engine, [ids], tokenizer=opened.tokenizer, max_new_tokens=max_new_tokens)
    for event in run:
        if aloud:
            sys.stdout.write(event.text or "")
            sys.stdout.flush()
    return Answer(opened.engine.name, dtype, run.timings), opened
