"""`writehead systems`: the catalog as a table, and as the page docs/systems.md."""

from pathlib import Path
from typing import Annotated, Any

import typer

WIDE = 100  # columns from which on the summaries stand in the table


def command(
    family: Annotated[str | None, typer.Option(help="Only this family of systems.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True, help="Print docs/systems.md.")] = False,
    presets: Annotated[
        bool, typer.Option("--presets", help="Papers' runs that train and plan take by name, instead.")
    ] = False,
    gallery: Annotated[
        Path | None, typer.Option(metavar="PAGE.md", help="Write a page with pictures of all fixed patterns.")
    ] = None,
) -> None:
    from writehead.catalog import Row
    from writehead.cli.cards import TABLES
    from writehead.cli.output import console, print_json, table
    from writehead.core.shapes import check_choice

    if markdown:
        typer.echo(page(), nl=False)
        return
    if gallery is not None:
        from writehead.cli.gallery import write

        for path in write(gallery):
            typer.echo(f"wrote {path}")
        return
    if presets:
        show_presets(as_json)
        return
    families = {row.family for rows in TABLES.values() for row in rows.values()}
    if family is not None:
        check_choice("family", family, families)
    kept = {
        title: [row for row in rows.values() if family in (None, row.family)]
        for title, rows in TABLES.items()
    }
    if as_json:
        print_json([{"table": title, **row_dict(row)} for title, rows in kept.items() for row in rows])
        return
    screen = console()
    groups: dict[str, list[Row]] = {}
    for row in (row for rows in kept.values() for row in rows):
        groups.setdefault(row.family, []).append(row)
    wide = screen.width >= WIDE
    for name, rows in groups.items():
        grid = table(name, "cost", "decodes", "paper", *(["summary"] if wide else []))
        for column in grid.columns:
            column.justify, column.no_wrap = "left", column.header != "summary"
        for row in rows:
            grid.add_row(row.name, row.cost, row.decodes, row.paper, *([row.summary] if wide else []))
        screen.print(grid)
        if not wide:
            for row in rows:
                screen.print(f"{row.name}: {row.summary}", style="dim", soft_wrap=True)
        screen.print()


def show_presets(as_json: bool) -> None:
    """Print the presets: their parameters beside the published ones."""
    from writehead.cli.output import console, count, print_json, table
    from writehead.costs import parameters, skeleton
    from writehead.presets import PRESETS

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "paper": preset.paper,
            "parameters": parameters(skeleton(preset.config)),
            "published": None if preset.published is None else preset.published * 10**6,
            "differs": preset.differs,
            "run": preset.run,
        }
        for name, preset in PRESETS.items()
    ]
    if as_json:
        print_json(found)
        return
    grid, screen = table("preset", "parameters", "published", "paper"), console()
    for one in found:
        published = "" if one["published"] is None else count(int(one["published"]))
        grid.add_row(one["name"], count(one["parameters"]), published, one["paper"])
    screen.print(grid)
    for one in found:
        if one["differs"]:
            screen.print(f"{one['name']}: {one['differs']}", style="dim", soft_wrap=True)


def row_dict(row: object) -> dict[str, object]:
    """A row of the catalog as JSON can hold it."""
    from writehead.catalog import Row
    from writehead.cli.cards import plain

    assert isinstance(row, Row)
    return {key: plain(value) for key, value in row._asdict().items()}


def page() -> str:
    """docs/systems.md, out of the catalog and the cards."""
    from writehead.cli.cards import TABLES, card

    lines = [
        "# Systems",
        "",
        "Made by `writehead systems --markdown` from the catalog and the cards; a test keeps it up to date.",
        "T is tokens of the whole sequence, S tokens in the past, W a window.",
        "`writehead show NAME` draws who sees whom and counts bytes and operations.",
    ]
    for title, rows in TABLES.items():
        lines += ["", f"## {title.capitalize()}", ""]
        lines += ["| name | paper | family | cost | decodes | summary |", "|---" * 6 + "|"]
        lines += [
            f"| `{r.name}` | {r.paper} | {r.family} | {r.cost} | {r.decodes} | {r.summary} |"
            for r in rows.values()
        ]
        modules: dict[str, list[str]] = {}
        for row in rows.values():
            modules.setdefault(row.target.partition(":")[0], []).append(row.name)
        for module, names in modules.items():
            heading, fields = card(rows[names[0]])
            lines += ["", f"### {', '.join(f'`{name}`' for name in names)}", ""]
            lines += [f"{heading} (`writehead/{module.replace('.', '/')}.py`)", "", "```text"]
            lines += [f"{field:<9} {value}" for field, value in fields.items()]
            lines += ["```"]
    return "\n".join(lines) + "\n"
