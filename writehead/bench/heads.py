"""What sharing key/value heads buys: one model shape with all, some and one of them, over batches and
contexts.

Decoding reads the weights once a step and every row's cache once a token: sharing heads shrinks the second
part by their ratio. The prediction is the roofline of this machine; a measured ratio above the ratio of
heads would mean that the multi-head baseline is badly laid out, not that fewer bytes were moved.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from writehead.bench.decode import Cell, Need
from writehead.bench.machine import Roofs
from writehead.bench.measure import Case, Timing, alternate
from writehead.bench.ours import TORCH, Ours
from writehead.config import ModelConfig
from writehead.core.cache import KV
from writehead.core.slots import Store
from writehead.core.system import available_memory
from writehead.core.work import Call
from writehead.costs import skeleton, state_bytes
from writehead.decode.engine import TorchEngine
from writehead.model.decoder import Decoder, DecodeState

SIXTEEN = ModelConfig(
    vocab=32000,
    dim=1024,
    depth=4,
    mixer={"name": "gqa", "heads": 16, "kv_heads": 16},
    feedforward={"name": "dense", "hidden": 2816, "activation": "silu", "gated": True},
)  # 16 heads and few layers, so that caches of 32k tokens in 8 rows fit a small machine


@dataclass(frozen=True)
class Shared:
    """One cell of the grid.

    Attributes:
        heads, kv_heads, batch, context: what was measured; timing is None where memory did not allow it.
        roof_s: the least seconds of a step.
        state_bytes: of the caches.
    """

    heads: int
    kv_heads: int
    batch: int
    context: int
    timing: Timing | None
    roof_s: float
    state_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def choices(heads: int) -> tuple[int, ...]:
    """All heads, a third or a quarter of them (what divides), and one.

    Args:
        heads: query heads.
    """
    some = next((heads // part for part in (3, 4, 2) if heads % part == 0 and heads > part), 1)
    return tuple(sorted({heads, some, 1}, reverse=True))


def with_kv_heads(config: ModelConfig, kv_heads: int) -> ModelConfig:
    """The same shape with another number of key/value heads in every layer."""
    specs = config.mixer if isinstance(config.mixer, tuple) else (config.mixer,)
    shared = tuple({**spec, "kv_heads": kv_heads} for spec in specs)
    return replace(config, mixer=shared[0] if len(shared) == 1 else shared)


def grid(
    config: ModelConfig,
    batches: Iterable[int],
    contexts: Sequence[int],
    roofs: Roofs,
    *,
    rounds: int = 5,
    steps: int = 4,
    say: Callable[[str], None] = lambda text: None,
) -> list[Shared]:
    """Measure a decode step of the shape with random weights, for each number of key/value heads.

    Args:
        config: a decoder whose mixers take kv_heads.
        batches, contexts: rows, and tokens behind the step.
        roofs: of this machine, of this run.
        rounds: samples of each cell, in turns over the numbers of heads.
        steps: decode steps of one sample.
        say: told what happens, before it happens.
    """
    spec = config.mixer[0] if isinstance(config.mixer, tuple) else config.mixer
    heads = int(spec["heads"])
    shapes = {kv: with_kv_heads(config, kv) for kv in choices(heads)}
    models = {kv: Decoder(shape).eval() for kv, shape in shapes.items()}
    cells = []
    for batch in batches:
        for context in contexts:
            say(f"{heads} heads, batch {batch}, context {context}")
            call = Call(batch=batch, context=context, store=Store(capacity=context + steps))
            held = {kv: state_bytes(skeleton(shape), call) for kv, shape in shapes.items()}  # type: ignore[arg-type]
            free = available_memory()
            fits: list[int] = []
            for kv in sorted(held, key=lambda kv: kv not in (1, heads)):  # the ends of the range matter most
                if free is None or sum(held[k] for k in [*fits, kv]) < 0.8 * free:
                    fits.append(kv)
            cell = Cell(batch, context)
            timings = alternate(
                {str(kv): step_case(models[kv], cell, steps) for kv in fits},
                rounds,
                min_seconds=0,
                max_rounds=rounds,
            )
            cells += [
                Shared(
                    heads, kv, batch, context, timings.get(str(kv)),
                    Need.of(models[kv], cell, "float32", 0, torch.float32).seconds(roofs), held[kv],
                )
                for kv in models
            ]  # fmt: skip
    return cells


def filled(model: Decoder, batch: int, context: int, spare: int) -> DecodeState:
    """A state as if each row held `context` tokens, with room for `spare` more, filled without computing
    them.

    Raises:
        ValueError: a layer that keeps something else than keys and values.
    """
    state = model.init_state(batch, Store(capacity=context + spare))
    pos: dict[int, Tensor] = {}
    layers = []
    for kv, memory in state.layers:
        if not isinstance(kv, KV) or kv.layout.window is not None or kv.scales is not None:
            raise ValueError("only growing float caches can be filled without computing their tokens")
        if id(kv.pos) not in pos:
            pos[id(kv.pos)] = kv.pos.clone()
            pos[id(kv.pos)][:, :context] = torch.arange(context)
        for values in (kv.k, kv.v):
            values[:, :, :context] = torch.randn(values.shape[-1]).to(values)
        layers.append((replace(kv, pos=pos[id(kv.pos)], used=context), memory))
    return DecodeState(torch.full_like(state.pos, context), tuple(layers))


def step_case(model: Decoder, cell: Cell, steps: int) -> Case:
    """Decode steps of the PyTorch engine behind a cache that is filled, not computed."""
    ours = Ours(TORCH, TorchEngine(model))
    with torch.inference_mode():
        state = filled(model, cell.batch, cell.context, steps)
    ours.hold(cell.context, torch.full((cell.batch,), 7), state)
    return partial(ours.decode, cell.context, cell.batch, steps)
