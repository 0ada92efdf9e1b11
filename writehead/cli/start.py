"""`writehead bench start`: how long a first token takes, from the start of a process."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def start(
    model: Annotated[
        str, typer.Option(help="smollm2, packed in int8 for this; a model folder, or a FILE.gguf.")
    ] = "smollm2",
    prompt: Annotated[str | None, typer.Option(help="Default: a text of about 100 tokens.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each way.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for start.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """From the start of a process to a first token: without PyTorch and with it, part by part."""
    from writehead.bench.measure import jsonable, write_record
    from writehead.bench.start import PROMPT, measure
    from writehead.cli.output import console, print_json, say, table
    from writehead.convert.find import find
    from writehead.convert.packed import load_packed, save_packed
    from writehead.convert.packed_map import is_packed

    text = PROMPT if prompt is None else prompt
    with tempfile.TemporaryDirectory() as temporary:
        folder = find(model)
        if not is_packed(folder):
            say("packing")
            folder = Path(temporary) / "packed"
            loaded = load_packed(model, "int8")
            save_packed(loaded.model, folder, tokenizer=loaded.tokenizer)
        found = measure(folder, text, rounds=rounds, say=say)
    say("")
    if as_json:
        print_json({"prompt": text, "starts": jsonable(found)})
    else:
        names = list(dict.fromkeys(name for one in found for name in one.stages))
        grid = table("ms", *(f"{one.way}" for one in found))
        for name in names:
            grid.add_row(name, *(f"{1e3 * one.stages.get(name, 0):.0f}" for one in found))
        grid.add_row("the command's first token", *(f"{1e3 * one.timing.median:.0f}" for one in found))
        console().print(grid)
    if out is not None:
        write_record(out / "start.json", "start", found, {"model": model, "prompt": text, "rounds": rounds})
        typer.echo(f"written: {out / 'start.json'}", err=True)
