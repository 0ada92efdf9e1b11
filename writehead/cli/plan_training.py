"""`writehead plan MODEL --train`: what a training step holds, and the largest one that fits."""

import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from writehead.config import ModelConfig
    from writehead.train.memory import Setting

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(text: str) -> int:
    """Bytes that a text such as 12GB (10^9) or 12GiB (2^30) names."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise typer.BadParameter(f"--budget must be a size such as 12GB, 16GiB or 500MB; got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def lengths_of(text: str | None) -> list[int]:
    """The numbers of a list such as 64,128,256."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--lengths must be numbers of tokens such as 64,128,256; got {text!r}")
    return [int(part) for part in parts]


def report(
    config: "ModelConfig", setting: "Setting", budget: int | None, lengths: list[int]
) -> dict[str, Any]:
    """For each way to train the model its peak, or why it cannot be had; with a budget, what fits in it.

    Args:
        config: the model.
        setting: the step.
        budget: bytes; None asks for no batch and no length.
        lengths: those whose largest batch is wanted; empty = that of `setting`, and the largest length.
    """
    from writehead.train.memory import largest, plans, predict

    found: dict[str, Any] = {}
    for name, way in plans(config, setting).items():
        try:
            found[name] = asdict(predict(*way))
            if budget is not None:
                model, how = way
                found[name]["batches"] = {
                    T: largest(model, replace(how, length=T), budget)[0] for T in lengths or [setting.length]
                }
                if not lengths:
                    found[name]["longest"] = largest(model, how, budget, "length")[0]
        except ValueError as error:
            found[name] = {"error": str(error)}
    return found


def show(title: str, found: dict[str, Any], setting: "Setting", budget: int | None) -> None:
    """Print a report as a table."""
    from writehead.cli.output import console, size, table

    screen, good = console(), {name: one for name, one in found.items() if "error" not in one}
    screen.print(title, style="bold")
    rows = f"{setting.batch} row{'s' if setting.batch > 1 else ''}"
    screen.print(f"a training step of {rows} of {setting.length} tokens, {setting.precision}")
    screen.print()
    grid = table("", *good)
    parts = {
        "weights and optimiser": "fixed",
        "kept by the forward pass": "kept",
        "peak of the step": "most",
    }
    for label, key in parts.items():
        grid.add_row(label, *(size(one[key]) for one in good.values()))
    if budget is not None and good:
        for length in next(iter(good.values()))["batches"]:
            grid.add_row(
                f"rows of {length} in {size(budget)}", *(f"{o['batches'][length]:,}" for o in good.values())
            )
        if all("longest" in one for one in good.values()):
            grid.add_row(f"tokens of {rows} in {size(budget)}", *(f"{o['longest']:,}" for o in good.values()))
    screen.print(grid)
    screen.print()
    screen.print(
        "Predicted: bytes of tensors on one device. A process holds its code and libraries beside them."
    )
    for name, one in found.items():
        if "error" in one:
            screen.print(f"{name} cannot be had: {one['error']}")
