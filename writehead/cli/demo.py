"""`writehead demo`: the main job on the embedded model: decode it, see how fast and why, see what head
sharing buys."""

from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "In two sentences, why do language models slow down as the conversation gets longer?"


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
    from writehead.cli.tables import heads_table
    from writehead.convert.load import load
    from writehead.core.system import available_memory, cores

    torch.set_num_threads(cores())
    loaded = load(model, memory_bytes=available_memory())
    limits = roofs(torch.get_num_threads(), 2**29)
    _answer(loaded, prompt, max_new_tokens, limits)
    shape = loaded.config
    typer.echo("\nThe same model shape with all, some and one key/value head (random weights):")
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


def _answer(loaded: Any, prompt: str, max_new_tokens: int, limits: Any) -> None:
    """Stream the answer, then one line for each speed."""
    import sys

    from writehead.cli.output import size
    from writehead.decode.generate import stream

    tokenizer = loaded.tokenizer
    text = tokenizer.chat([{"role": "user", "content": prompt}])
    typer.echo(f"> {prompt}\n")
    run = stream(
        loaded.model, [tokenizer.encode(text, bos=False)], tokenizer=tokenizer, max_new_tokens=max_new_tokens
    )
    for event in run:
        sys.stdout.write(event.text or "")
        sys.stdout.flush()
    t = run.timings
    reached, bound = t.bandwidth, limits.bandwidth_at(int(t.bytes_per_token))
    typer.echo(
        f"\n\nprefill  {t.prefill_tokens} tokens, {t.prefill_rate:.0f} tokens/s"
        f"\ndecode   {t.decode_tokens} tokens, {t.decode_rate:.1f} tokens/s on the {t.engine} engine, float32"
        f"\nmoved    {size(t.bytes_per_token)} a token: {size(reached)}/s, {reached / bound:.0%} of the "
        f"{size(bound)}/s that this machine reads"
    )
