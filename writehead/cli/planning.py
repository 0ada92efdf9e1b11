"""The figures behind `writehead plan`: a model with several numbers of key/value heads, priced and timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from writehead.bench import machine
from writehead.catalog import MIXERS, argument
from writehead.config import ModelConfig
from writehead.core.slots import Store
from writehead.core.system import available_memory
from writehead.core.work import Call
from writehead.costs import Model, costs, parameters, read_costs, skeleton
from writehead.model.encoder import Encoder
from writehead.model.seq2seq import Seq2Seq

CONTEXT = 2048  # tokens, unless the model was made for fewer
POINTS = 9  # contexts of the plot


@dataclass(frozen=True)
class Limits:
    """The machine that a plan is for.

    Attributes:
        bandwidth: bytes per second for a working set in bytes.
        rate: operations per second.
        source: where the two come from, in words.
    """

    bandwidth: Callable[[float], float]
    rate: float
    source: str

    @classmethod
    def of(cls, bandwidth: float | None, rate: float | None, dtype: str) -> "Limits":
        """Given figures (bytes/s and operations/s); what is None is measured, which takes some seconds."""
        if bandwidth is not None and rate is not None:
            return cls(
                lambda _: bandwidth, rate, f"{_giga(bandwidth)} GB/s and {_giga(rate)} GFLOP/s, as given"
            )
        roofs = machine.roofs()
        named = dtype if dtype in roofs.matmul else "float32"
        measured = roofs.rate(named)
        words = [
            "bandwidth by working set, measured here"
            if bandwidth is None
            else f"{_giga(bandwidth)} GB/s, as given",
            f"{_giga(measured)} GFLOP/s of {named} products, measured here"
            if rate is None
            else f"{_giga(rate)} GFLOP/s, as given",
        ]
        reach = (lambda size: roofs.bandwidth_at(int(size))) if bandwidth is None else (lambda _: bandwidth)
        return cls(reach, measured if rate is None else rate, f"{words[0]}, and {words[1]}")


@dataclass(frozen=True)
class Plan:
    """One variant of a model, for one call.

    Attributes:
        name, kv_heads: the variant; kv_heads is None where layers differ or have none.
        own: is it the model as it was given?
        parameters: how many.
        weight_bytes, state_bytes: held in memory; the state is that of all rows with `context` tokens.
        flops_per_token, bytes_per_token: operations and least bytes moved, for each new token of the call.
        seconds: the least time of the call.
        tokens_per_second: new tokens of the call over that time.
        bound: "bandwidth" or "compute", whichever takes longer.
        bandwidth: bytes per second that `seconds` assumes.
        prefill_seconds: the least time to read `context` tokens in each row; None for an encoder.
    """

    name: str
    kv_heads: int | None
    own: bool
    parameters: int
    weight_bytes: int
    state_bytes: int
    flops_per_token: float
    bytes_per_token: float
    seconds: float
    tokens_per_second: float
    bound: str
    bandwidth: float
    prefill_seconds: float | None

    @property
    def memory_bytes(self) -> int:
        """Weights and state together."""
        return self.weight_bytes + self.state_bytes


def make_call(
    config: ModelConfig, context: int | None, batch: int, itemsize: int, cache: torch.dtype | None
) -> Call:
    """The call that a plan prices: the step that fills the context, or for an encoder the whole sequence.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    limit = skeleton(config if config.encoder is None else config.encoder)
    positions = limit.embedding.position.max_context if not isinstance(limit, Seq2Seq) else None
    if context is None:
        context = min(n for n in (CONTEXT, config.max_context, positions) if n is not None)
    if positions is not None and context > positions:
        raise ValueError(f"context={context} is beyond the model's {positions} positions")
    if config.kind == "encoder":
        return Call(batch=batch, tokens=context, itemsize=itemsize)
    store = Store(capacity=context, dtype=cache)
    source = context if config.kind == "seq2seq" else 0
    return Call(batch=batch, context=context - 1, source=source, itemsize=itemsize, store=store)


def variants(config: ModelConfig) -> list[tuple[str, ModelConfig]]:
    """The model with all, some and one key/value head in each layer; itself alone where heads are not shared.

    The middle is the model's own number, else a quarter of the heads, else a third.
    """
    own = {_heads(config.layer("mixer", i)) for i in range(config.depth)}
    if any(heads is None for heads, _ in own):
        return [("as it is", config)]
    if len(own) > 1:
        return [
            ("as it is", config),
            ("multi-head", _share(config, 1)),
            ("multi-query", _share(config, None)),
        ]
    [(heads, kv_heads)] = own
    shares = (
        [heads // kv_heads]
        if 1 < kv_heads < heads
        else [n for n in (4, 3, 2) if heads % n == 0 and n < heads]
    )
    made = {heads: ("multi-head", _share(config, 1)), 1: ("multi-query", _share(config, None))}
    if shares:
        made[heads // shares[0]] = ("grouped", _share(config, shares[0]))
    made[kv_heads] = (made[kv_heads][0], config)
    return [made[number] for number in sorted(made, reverse=True)]


def plan(name: str, config: ModelConfig, own: bool, call: Call, limits: Limits) -> Plan:
    """Price and time one variant."""
    model = skeleton(config)
    cost, count = costs(model, call), parameters(model)
    bandwidth = limits.bandwidth(cost.moved)
    seconds = cost.seconds(bandwidth, limits.rate)
    heads = {_heads(config.layer("mixer", i))[1] for i in range(config.depth)}
    return Plan(
        name=name,
        kv_heads=heads.pop() if len(heads) == 1 else None,
        own=own,
        parameters=count,
        weight_bytes=count * call.itemsize,
        state_bytes=cost.state_bytes,
        flops_per_token=cost.flops / call.rows,
        bytes_per_token=cost.moved / call.rows,
        seconds=seconds,
        tokens_per_second=call.rows / seconds,
        bound="bandwidth" if cost.moved / bandwidth >= cost.flops / limits.rate else "compute",
        bandwidth=bandwidth,
        prefill_seconds=_prefill(model, call, limits),
    )


def plans(config: ModelConfig, call: Call, limits: Limits) -> list[Plan]:
    """All variants of a model."""
    return [plan(name, one, one is config, call, limits) for name, one in variants(config)]


def concerns(config: ModelConfig, call: Call, own: Plan) -> list[str]:
    """What a user should know before running it."""
    context, free, found = call.context + call.tokens, available_memory(), []
    if free is not None and own.memory_bytes > free:
        found.append(
            f"the model does not fit: it needs {own.memory_bytes:,} bytes ({own.weight_bytes:,} of weights, "
            f"{own.state_bytes:,} of state), {free:,} are available"
        )
    if config.max_context is not None and context > config.max_context:
        found.append(f"context={context} is beyond the {config.max_context} tokens the model was made for")
    return found


def png(title: str, config: ModelConfig, call: Call, limits: Limits) -> bytes:
    """Predicted speed and memory over the context, a line for each variant.

    Raises:
        ValueError: matplotlib is not installed.
    """
    from writehead.cli.picture import figure, save, wrapped

    sheet = figure()(figsize=(10, 4.4), layout="constrained")
    sheet.suptitle(wrapped(f"{title}\n{limits.source}", 10), fontsize=10)
    speed, memory = sheet.subplots(1, 2)
    most = call.context + call.tokens
    contexts = sorted({max(1, most >> shift) for shift in range(POINTS)})
    for index, (name, _) in enumerate(variants(config)):
        made = [plans(config, _at(call, context), limits)[index] for context in contexts]
        label = name if made[0].kv_heads is None else f"{name}: {made[0].kv_heads} key/value heads"
        style = {"label": label, "marker": "o", "linewidth": 2.5 if made[0].own else 1.2}
        speed.plot(contexts, [one.tokens_per_second for one in made], **style)
        memory.plot(contexts, [one.memory_bytes / 1e9 for one in made], **style)
    for axes, what in ((speed, "predicted tokens/s, at most"), (memory, "weights and state, GB")):
        axes.set(xscale="log", xlabel="context in tokens", ylabel=what, ylim=(0, None))
        axes.set_xticks(contexts, [str(context) for context in contexts], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.legend()
    return save(sheet)


def _at(call: Call, context: int) -> Call:
    if call.tokens > 1:
        return replace(call, tokens=context)
    store = replace(call.store, capacity=context)
    return replace(call, context=context - 1, source=min(call.source, context), store=store)


def _prefill(model: Model, call: Call, limits: Limits) -> float | None:
    if isinstance(model, Encoder):
        return None
    if isinstance(model, Seq2Seq):
        cost = read_costs(model, call)
    else:
        cost = costs(model, replace(call, tokens=call.context + call.tokens, context=0, logits=1))
    return cost.seconds(limits.bandwidth(cost.moved), limits.rate)


def _heads(spec: Any) -> tuple[Any, Any]:
    """Query and key/value heads of a mixer; None, None if it does not share heads."""
    heads, kv_heads = argument(MIXERS, spec, "heads"), argument(MIXERS, spec, "kv_heads")
    return (None, None) if heads is None else (heads, heads if kv_heads is None else kv_heads)


def _share(config: ModelConfig, group: int | None) -> ModelConfig:
    """The model with `group` query heads to a key/value head, or all to one, its cross-attentions too."""

    def shared(spec: Any) -> Any:
        heads = _heads(spec)[0]
        kv_heads = 1 if group is None else heads // group
        return spec if heads is None or (group and heads % group) else {**spec, "kv_heads": kv_heads}

    mixers = config.mixer if isinstance(config.mixer, tuple) else (config.mixer,)
    cross = None if config.cross is None else shared(config.cross)
    return replace(config, mixer=tuple(shared(spec) for spec in mixers), cross=cross)


def _giga(number: float) -> str:
    return f"{number / 1e9:.4g}"
