"""`writehead show NAME`: one system's card, arguments, costs, and the picture of who sees whom."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from writehead.catalog import Row

CONTEXTS = (1024, 8192, 65536)
HEAD_DIM = 64  # of the heads whose costs are shown
TOKENS = 48  # of the picture


def command(
    name: Annotated[str, typer.Argument(help="A system that `writehead systems` lists.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An argument, such as heads=4; repeatable."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the picture into this file too.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the picture.")] = TOKENS,
    image: Annotated[
        int | None, typer.Option(min=1, help="Tokens are an image so wide; draw a query's keys as pixels.")
    ] = None,
    query: Annotated[
        int | None, typer.Option(min=0, help="Of an image: which query; default the one in its middle.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from writehead.cli.cards import find_any, over_preset, settings

    _, row = find_any(name)
    given = over_preset(row, settings(set_ or []))
    explained = explain(row, given, context)
    query = _on_image(explained, image, query, context)
    if png is not None:
        _write_png(png, explained, query)
    if as_json:
        from writehead.cli.output import print_json

        print_json(_as_json(explained))
        return
    from writehead.cli.output import console

    _print(console(), explained, query)
    if png is not None:
        typer.echo(f"wrote {png}")


def _on_image(found: dict[str, Any], image: int | None, query: int | None, context: int) -> int:
    """Lay the picture's tokens out as an image, if one is asked for; gives the query that is drawn on it.

    Raises:
        typer.BadParameter: there is no picture or no image, or no such query.
    """
    from dataclasses import replace

    picture = found.get("picture")
    if image is not None:
        from writehead.cli.image_grid import Grid

        if picture is None:
            raise typer.BadParameter(f"--image: {found['name']} has no picture of queries and keys")
        if picture.grid is not None and picture.grid.width != image:
            raise typer.BadParameter(f"--image {image}: this mixer's images are {picture.grid.width} wide")
        if picture.grid is None:
            found["picture"] = picture = replace(picture, grid=Grid(image))
    if query is not None and (picture is None or picture.grid is None):
        raise typer.BadParameter("--query is for images: give --image WIDTH too")
    if query is not None and query >= context:
        raise typer.BadParameter(f"--query {query} is beyond the picture's {context} tokens")
    if query is None and picture is not None and picture.grid is not None:
        query = min(
            context - 1, (context // picture.grid.width // 2) * picture.grid.width + picture.grid.width // 2
        )
    return query or 0


def explain(row: "Row", given: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Everything that `show` says of a system; the picture and curves as objects of their modules.

    Raises:
        ValueError: an argument that the system does not take, or a context out of range.
    """
    from writehead.catalog import FEEDFORWARDS, MIXERS, POSITIONS, build
    from writehead.cli.cards import REQUIRED, arguments, card, plain

    title, fields = card(row)
    spec = {"name": row.name, **{key: value for key, value in given.items() if key != "dim"}}
    takes = [a._replace(value=given.get(a.name, a.value)) for a in arguments(row)]
    found: dict[str, Any] = {
        "name": row.name,
        "summary": row.summary,
        "title": title,
        "family": row.family,
        "paper": row.paper,
        "card": fields,
        "cost": row.cost,
        "decodes": row.decodes,
        "arguments": [{**a._asdict(), "value": plain(a.value)} for a in takes],
        "needs": [a.name for a in takes if a.value == REQUIRED],
    }
    if found["needs"]:
        return found
    if row.name in MIXERS:
        from writehead.cli.picture import probe

        dim = given.get("dim")
        found |= {"figures": figures(row, spec, dim), "picture": probe(spec, context, dim)}
    elif row.name in POSITIONS:
        from writehead.cli.curves import curves

        found["curves"] = curves(spec, context, given.get("heads", 8), given.get("head_dim", HEAD_DIM))
    elif row.name in FEEDFORWARDS:
        build(FEEDFORWARDS, spec, dim=given.get("dim", 8))  # refuses arguments that it does not take
    return found


def figures(row: "Row", spec: Mapping[str, Any], dim: int | None) -> dict[str, Any]:
    """What a mixer costs at heads of `HEAD_DIM`: for each of `CONTEXTS`, the past of one decoding row.

    An encoder's figures are those of a whole sequence, those of cross-attention of a source, of that length.
    """
    from writehead.catalog import MIXERS, argument, build
    from writehead.core.work import Call, values

    heads = argument(MIXERS, spec, "heads") or 8
    dim = dim or heads * HEAD_DIM
    mixer = build(MIXERS, spec, dim=dim, position=None)
    columns = []
    for context in CONTEXTS:
        if hasattr(mixer, "memory_bytes"):
            calls = [Call(source=context, itemsize=itemsize) for itemsize in (4, 2)]
            held = [mixer.memory_bytes(call) for call in calls]
        elif row.decodes == "encode":
            calls = [Call(tokens=context, itemsize=itemsize) for itemsize in (4, 2)]
            held = [0, 0]
        else:
            calls = [Call(context=context, itemsize=itemsize) for itemsize in (4, 2)]
            held = [mixer.state_bytes(1, context, call.itemsize) for call in calls]
        work = mixer.work(calls[0])
        columns.append(
            {
                "context": context,
                "state_bytes_float32": held[0],
                "state_bytes_bfloat16": held[1],
                "state_read_bfloat16": mixer.work(calls[1]).state_read,
                "flops": work.flops,
            }
        )
    return {
        "dim": dim,
        "heads": heads,
        "parameters": values(mixer),
        "of": _subject(row, mixer),
        "at": columns,
    }


def _subject(row: "Row", mixer: Any) -> str:
    if hasattr(mixer, "memory_bytes"):
        return "one token that reads a source of"
    return "a whole sequence of" if row.decodes == "encode" else "one token behind a past of"


def _print(screen: "Console", found: dict[str, Any], query: int) -> None:
    from rich.padding import Padding

    screen.print(f"{found['name']}  {found['summary']}", style="bold")
    if found["title"]:
        screen.print(found["title"], style="dim")
    screen.print()
    for field, text in found["card"].items():
        _entry(screen, field, text)
    screen.print()
    if found["arguments"]:
        screen.print("Arguments", style="bold")
        for argument in found["arguments"]:
            says = f"  {argument['says']}" if argument["says"] else ""
            screen.print(Padding(f"{argument['name']} = {_short(argument['value'])}{says}", (0, 0, 0, 2)))
        screen.print()
    if found["needs"]:
        screen.print(f"Costs and pictures need {' and '.join(f'--set {n}=VALUE' for n in found['needs'])}.")
    if "figures" in found:
        _print_figures(screen, found["figures"])
    if "picture" in found:
        _print_picture(screen, found["picture"], query)
    if "curves" in found:
        from writehead.cli.curves import draw

        says, lines = found["curves"]
        screen.print(f"Positions: {says}", style="bold")
        for line in draw(lines, screen.width, screen.options.ascii_only):
            screen.print(line)


def _entry(screen: "Console", field: str, text: str) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=8, style="bold")
    grid.add_column()
    grid.add_row(field, text)
    screen.print(grid)


def _print_figures(screen: "Console", found: dict[str, Any]) -> None:
    from writehead.cli.output import count, size, table

    screen.print(
        f"Costs of {found['of']} S tokens, at dim {found['dim']}, heads {found['heads']}: "
        f"{count(found['parameters'])} parameters",
        style="bold",
    )
    grid = table("S", *(f"{column['context'] // 1024}k" for column in found["at"]))
    rows = {
        "state held, float32": ("state_bytes_float32", size),
        "state held, bfloat16": ("state_bytes_bfloat16", size),
        "state read, bfloat16": ("state_read_bfloat16", size),
        "operations": ("flops", count),
    }
    for label, (key, words) in rows.items():
        if any(column[key] for column in found["at"]):
            grid.add_row(label, *(words(column[key]) for column in found["at"]))
    screen.print(grid)
    screen.print()


def _print_picture(screen: "Console", picture: Any, query: int) -> None:
    from writehead.cli.image_grid import lines
    from writehead.cli.picture import draw

    length = picture.seen.shape[-1]
    screen.print(
        f"Who sees whom, by gradients of the built mixer: {length} queries downwards, {length} keys across",
        style="bold",
    )
    for line in draw(picture, screen.width, screen.options.ascii_only):
        screen.print(line)
    screen.print(verdict(picture))
    for title, plane in picture.planes() if picture.grid is not None else []:
        screen.print(f"{title} on the image: Q is query {query}, # the keys that it reads".strip())
        for line in lines(picture.grid.cells(plane[query], query)):
            screen.print(line)


def verdict(picture: Any) -> str:
    """How the picture compares with the pattern that the mixer states."""
    if picture.stated is None:
        return "the mixer states no pattern to compare with"
    if picture.wrong:
        return f"DIFFERS in {picture.wrong} pairs from the pattern {picture.pattern}"
    return f"equal to the pattern {picture.pattern} in every pair"


def _write_png(path: Path, found: dict[str, Any], query: int) -> None:
    from writehead.cli.output import write_whole

    title = f"{found['name']}: {found['summary']}"
    if "picture" in found:
        from writehead.cli import picture

        write_whole(path, picture.png(found["picture"], f"{title}\n{verdict(found['picture'])}", query))
    elif "curves" in found:
        from writehead.cli import curves

        says, lines = found["curves"]
        write_whole(path, curves.png(says, lines, title))
    else:
        raise ValueError(f"{found['name']} is a part without a picture; leave out --png")


def _as_json(found: dict[str, Any]) -> dict[str, Any]:
    values = dict(found)
    if "picture" in values:
        picture = values.pop("picture")
        planes = [["".join(map(str, row)) for row in plane.int().tolist()] for plane in picture.seen]
        values["sees"] = {
            "heads": planes,
            "pattern": picture.pattern or None,
            "differing_pairs": picture.wrong,
        }
        if picture.stated is None:
            values["sees"]["differing_pairs"] = None
    if "curves" in values:
        says, lines = values["curves"]
        values["curves"] = {"says": says, "by_distance": {line.label: line.values for line in lines}}
    return values


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    import json

    return json.dumps(value)
