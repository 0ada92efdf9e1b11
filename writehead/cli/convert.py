"""`writehead convert`: a model in another type and format, in a folder of its own."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from writehead.native.weights import PackedModel

DTYPES = ("float32", "bfloat16", "int8", "int4")
FORMATS = ("packed", "writehead", "huggingface")


def command(
    model: Annotated[str, typer.Argument(help="smollm2, a model folder or a FILE.gguf.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4.")] = "float32",
    format: Annotated[
        str | None,
        typer.Option(
            help="packed (for the native engine, loaded at once), writehead or huggingface (float types); "
            "default packed for int8 and int4, else writehead."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
) -> None:
    """Write a model as another folder: quantised for the native engine, or as floats for other tools."""
    from writehead.cli.generate import check

    quantised = dtype in ("int8", "int4")
    check("--dtype", dtype, DTYPES)
    format = format or ("packed" if quantised else "writehead")
    check("--format", format, FORMATS)
    if quantised and format != "packed":
        raise typer.BadParameter(f"--format {format} holds floats; {dtype} needs --format packed")
    from writehead.core.system import available_memory

    began = time.perf_counter()
    if format == "packed":
        from writehead.convert.packed import load_packed, save_packed

        found = load_packed(model, dtype, memory_bytes=available_memory())
        save_packed(found.model, out, tokenizer=found.tokenizer, overwrite=overwrite)
        what = _kinds(found.model)
    else:
        import torch

        from writehead.convert.load import load, save

        loaded = load(model, dtype=getattr(torch, dtype), memory_bytes=available_memory())
        save(loaded.model, out, format=format, tokenizer=loaded.tokenizer, overwrite=overwrite)
        what = f"{format} format, {dtype}"
    from writehead.cli.output import size

    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    typer.echo(f"{out}: {what}, {size(nbytes)}, written in {time.perf_counter() - began:.1f} s")


def _kinds(model: "PackedModel") -> str:
    """How many matrices have which type."""
    from collections import Counter

    counts = Counter(matrix.format for matrix in model.matrices.values())
    return "packed format, " + ", ".join(f"{count} matrices in {kind}" for kind, count in counts.items())
