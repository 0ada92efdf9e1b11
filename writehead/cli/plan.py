"""`writehead plan MODEL`: what a model costs before it runs, beside other numbers of key/value heads."""

from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from writehead.cli.planning import Limits, Plan
    from writehead.config import ModelConfig
    from writehead.core.work import Call


class Dtype(StrEnum):
    """Types of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class CacheDtype(StrEnum):
    """Types of cached keys and values."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class Optimizer(StrEnum):
    """Optimisers of training."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"


def command(
    model: Annotated[
        str, typer.Argument(help="smollm2, a preset, a model folder, a config (JSON, YAML), or a FILE.gguf.")
    ],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in each row, the new one included.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.FLOAT32,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Type of cached keys and values; default as --dtype.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Memory bandwidth; default: measured here, in seconds."),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(metavar="GFLOP/S", help="Rate of products; default: measured here.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw speed and memory over context.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="A training step of --batch rows of --context tokens instead.")
    ] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --train: what fits in 12GB, 16GiB, ...")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="With --budget: the largest batch at 64,128,... tokens."),
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="With --train.")] = Optimizer.ADAMW,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    import torch

    from writehead.cli import planning
    from writehead.cli.models import config_of
    from writehead.cli.output import print_json, write_whole

    if train:
        given = {"--cache-dtype": cache_dtype, "--bandwidth": bandwidth, "--flops": flops, "--png": png}
        if unused := [option for option, value in given.items() if value is not None]:
            raise typer.BadParameter(f"{', '.join(unused)} belong to decoding: leave out with --train")
        _train(model, context, batch, dtype, budget, lengths, optimizer, as_json)
        return
    if budget is not None or lengths is not None or optimizer != Optimizer.ADAMW:
        raise typer.BadParameter("--budget, --lengths and --optimizer belong to training: add --train")

    for option, value in (("--bandwidth", bandwidth), ("--flops", flops)):
        if value is not None and not 0 < value < float("inf"):
            raise typer.BadParameter(f"{option} must be a number above 0; got {value}")
    config = config_of(model)
    cache = None if cache_dtype is None else getattr(torch, cache_dtype)
    call = planning.make_call(config, context, batch, getattr(torch, dtype).itemsize, cache)
    limits = planning.Limits.of(bandwidth and bandwidth * 1e9, flops and flops * 1e9, dtype)
    plans = planning.plans(config, call, limits)
    own = next(plan for plan in plans if plan.own)
    warnings = planning.concerns(config, call, own)
    words = {"dtype": dtype.value, "cache_dtype": (cache_dtype or dtype).value}
    if png is not None:
        write_whole(png, planning.png(f"{model}: {_subject(call, words)}", config, call, limits))
    if as_json:
        print_json(_as_json(model, config, call, words, limits, plans, warnings))
    else:
        _print(model, config, call, words, limits, plans)
        if png is not None:
            typer.echo(f"wrote {png}")
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _train(
    model: str,
    context: int | None,
    batch: int,
    dtype: Dtype,
    budget: str | None,
    lengths: str | None,
    optimizer: Optimizer,
    as_json: bool,
) -> None:
    from writehead.cli import plan_training, planning
    from writehead.cli.models import config_of
    from writehead.cli.output import print_json
    from writehead.train.memory import Setting

    if lengths is not None and budget is None:
        raise typer.BadParameter("--lengths asks what fits: add --budget, such as 12GB")
    config, wanted = config_of(model), plan_training.lengths_of(lengths)
    call = planning.make_call(config, max(wanted, default=context), batch, 4, None)
    length = max(wanted, default=call.context + call.tokens)
    setting = Setting(batch, length, precision=dtype.value, optimizer=optimizer.value)
    limit = None if budget is None else plan_training.bytes_of(budget)
    found = plan_training.report(config, setting, limit, wanted)
    if as_json:
        values = {"model": model, "config": config.to_dict(), "setting": asdict(setting), "budget": limit}
        print_json({**values, "plans": found})
    else:
        plan_training.show(f"{model}: {_describe(config)}", found, setting, limit)


def _print(
    model: str,
    config: "ModelConfig",
    call: "Call",
    words: dict[str, str],
    limits: "Limits",
    plans: list["Plan"],
) -> None:
    from writehead.cli.output import console, count, size, table

    screen = console()
    screen.print(f"{model}: {_describe(config)}", style="bold")
    screen.print(_subject(call, words))
    screen.print()
    grid = table("", *(_heading(plan) for plan in plans))
    rows: dict[str, Callable[[Plan], str]] = {
        "parameters": lambda p: count(p.parameters),
        "weights": lambda p: size(p.weight_bytes),
        "state of all rows": lambda p: size(p.state_bytes),
        "memory": lambda p: size(p.memory_bytes),
        "operations a token": lambda p: count(p.flops_per_token),
        "bytes a token": lambda p: size(p.bytes_per_token),
        "bandwidth": lambda p: f"{size(p.bandwidth)}/s",
        "bound by": lambda p: p.bound,
        "time, at least": lambda p: _time(p.seconds),
        "tokens/s, at most": lambda p: _speed(p.tokens_per_second),
        "prefill, at least": lambda p: "" if p.prefill_seconds is None else _time(p.prefill_seconds),
    }
    for label, cell in rows.items():
        if any(cell(plan) for plan in plans):
            grid.add_row(label, *(cell(plan) for plan in plans))
    screen.print(grid)
    screen.print()
    screen.print(f"Predicted from {limits.source}: the larger of bytes / bandwidth and operations / rate.")
    if len(plans) > 1:
        screen.print("* the model as it is; beside it the same shape with other numbers of key/value heads")


def _as_json(
    model: str,
    config: "ModelConfig",
    call: "Call",
    words: dict[str, str],
    limits: "Limits",
    plans: list["Plan"],
    warnings: list[str],
) -> dict[str, Any]:
    return {
        "model": model,
        "config": config.to_dict(),
        "batch": call.batch,
        "context": call.context + call.tokens,
        "new_tokens": call.tokens,
        **words,
        "limits": {"source": limits.source, "flops_per_second": limits.rate},
        "plans": [{**asdict(plan), "memory_bytes": plan.memory_bytes} for plan in plans],
        "warnings": warnings,
    }


def _describe(config: "ModelConfig") -> str:
    first = config.layer("mixer", 0)
    kinds = {config.layer("mixer", i)["name"] for i in range(config.depth)}
    heads = f" with {first['heads']} heads" if "heads" in first and len(kinds) == 1 else ""
    return (
        f"{config.kind} of {config.depth} layers, {', '.join(sorted(kinds))}{heads}, dim {config.dim}, "
        f"{config.position['name']} positions, vocabulary {config.vocab:,}"
    )


def _subject(call: "Call", words: dict[str, str]) -> str:
    rows = f"{call.batch} row{'s' if call.batch > 1 else ''}"
    types = f"weights {words['dtype']}"
    if call.tokens > 1:
        return f"encoding {rows} of {call.tokens} tokens, {types}"
    source = f" that read sources of {call.source} tokens" if call.source else ""
    step = f"a decode step of {rows} at context {call.context + 1}{source}"
    return f"{step}, {types}, cache {words['cache_dtype']}"


def _heading(plan: "Plan") -> str:
    heads = "" if plan.kv_heads is None else f" {plan.kv_heads}"
    return f"{plan.name}{heads}{' *' if plan.own else ''}"


def _speed(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _time(seconds: float) -> str:
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
