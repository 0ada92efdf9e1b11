"""`writehead sample MODEL`: images drawn from a model of pixels, as one picture."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The folder of a model of images (a run's DIR/latest).")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")],
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 16,
    columns: Annotated[int, typer.Option(min=1, help="Images of a row.")] = 8,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Enlarge each pixel so much.")] = 2,
    temperature: Annotated[float, typer.Option(help="Above 0; 1 is the model's own distribution.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws; default a fresh one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
) -> None:
    """Draw images from a model of pixels, and write them side by side as a PNG."""
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out} must end in .png")
    import torch

    from writehead.cli import png
    from writehead.cli.output import write_whole
    from writehead.convert.load import load
    from writehead.core.system import available_memory, cores
    from writehead.decode.images import draw_images, sheet
    from writehead.model.decoder import Decoder

    torch.set_num_threads(threads or cores())
    loaded = load(model, memory_bytes=available_memory())
    if not isinstance(loaded.model, Decoder) or loaded.config.pixels is None:
        raise ValueError(f"{loaded.source} is not a model of images: its config has no pixels")
    images, timings = draw_images(loaded.model, count, temperature=temperature, seed=seed)
    write_whole(out, png.encode(sheet(images, columns, scale)))
    rate = f"decode {timings.decode_tokens} positions, {timings.decode_rate:.1f} positions/s"
    typer.echo(rate, err=True)
    typer.echo(f"wrote {out}")
