"""How fast models decode: ours in cells of batch and context, beside the roofline and beside other engines.

Every cell is measured in turns (ours, peer, peer, ours, ...), so a noisy machine meets all engines alike;
ratios of one run are firm, absolute figures are not. Each figure stands beside its limit: the larger of
bytes over bandwidth and operations over rate, both measured in the same run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from writehead.bench.machine import Roofs, roofline_seconds
from writehead.bench.measure import Case, Timing, alternate
from writehead.bench.peers import DTYPES, Peer, Weights
from writehead.core.cache import KV, Store
from writehead.core.work import Call
from writehead.costs import costs
from writehead.decode.engine import TorchEngine
from writehead.model.decoder import Decoder, DecodeState

OURS = "writehead"
STEPS = 8  # decode steps of one sample
Say = Callable[[str], None]


class Cell(NamedTuple):
    """One thing to measure: decode steps behind `context` tokens, or with `batch` 0 the prefill of
    `context` tokens."""

    batch: int
    context: int

    @property
    def prefill(self) -> bool:
        return self.batch == 0

    def __str__(self) -> str:
        return f"prefill {self.context}" if self.prefill else f"batch {self.batch}, context {self.context}"


CELLS = (Cell(1, 128), Cell(1, 2048), Cell(16, 128), Cell(64, 128), Cell(0, 1024), Cell(0, 4096))


@dataclass(frozen=True)
class Row:
    """One engine in one cell.

    Attributes:
        engine, dtype, cell: what was measured.
        timing: seconds of a step, or of a whole prefill.
        tokens: tokens of that step or prefill.
        roof_s: the least time the machine allows for it; the same for all engines of a type.
    """

    engine: str
    dtype: str
    cell: Cell
    timing: Timing
    tokens: int
    roof_s: float

    @property
    def rate(self) -> float:
        """Tokens per second at the median."""
        return self.tokens / self.timing.median

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return {
            "engine": self.engine,
            "dtype": self.dtype,
            "cell": str(self.cell),
            **self.cell._asdict(),
            "tokens_per_s": self.rate,
            "share_of_roofline": self.roof_s / self.timing.median,
            "roofline_s": self.roof_s,
            "timing": asdict(self.timing),
        }


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


def our_case(model: Decoder, cell: Cell, steps: int = STEPS) -> Case:
    """A callable that runs the cell on our engine and returns its seconds; the cache is filled once, then
    reused."""
    import time

    engine = TorchEngine(model)
    if cell.prefill:
        prompt = (torch.arange(cell.context) % (engine.vocab - 1))[None]

        def prefill() -> float:
            start = time.perf_counter()
            engine.start(prompt, Store(capacity=cell.context))
            return time.perf_counter() - start

        return prefill
    with torch.inference_mode():
        held: list[DecodeState] = [filled(model, cell.batch, cell.context, steps)]

    def decode() -> float:
        from writehead.core.state import rewind

        tokens, state = torch.full((cell.batch,), 7), held.pop()
        start = time.perf_counter()
        for _ in range(steps):
            logits, state = engine.step(tokens, state)
            tokens = logits.argmax(-1)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            held.append(rewind(state, steps))
        return seconds / steps

    return decode


def peer_case(peer: Peer, cell: Cell, vocab: int) -> Case:
    """The same of another engine."""
    if cell.prefill:
        return partial(peer.prefill, [token % (vocab - 1) for token in range(cell.context)])
    return partial(peer.decode, cell.context, cell.batch, STEPS)


def roofline(model: Decoder, cell: Cell, roofs: Roofs, dtype: torch.dtype) -> float:
    """The least seconds of a step, or of a prefill, of which only the last token passes the output matrix."""
    name = str(dtype).removeprefix("torch.")
    call = Call(
        batch=max(cell.batch, 1),
        tokens=cell.context if cell.prefill else 1,
        context=0 if cell.prefill else cell.context,
        itemsize=dtype.itemsize,
    )
    cost, flops = costs(model, call), 0
    if cell.prefill:
        flops = 2 * (cell.context - 1) * model.config.vocab * model.config.dim
    return roofline_seconds(cost.moved, cost.flops - flops, roofs, cost.moved, dtype=name)


def compare(
    model: Decoder,
    dtype: torch.dtype,
    cells: Iterable[Cell],
    roofs: Roofs,
    peers: Sequence[Peer] = (),
    *,
    rounds: int = 5,
    say: Say = lambda text: None,
) -> list[Row]:
    """Measure each cell on our engine and on loaded peers, in turns.

    Args:
        model: with weights of `dtype`.
        dtype: of all engines.
        cells: what to measure.
        roofs: of this machine, of this run.
        peers: loaded with the same weights.
        rounds: samples of each engine and cell.
        say: told what happens, before it happens.
    """
    rows = []
    for cell in cells:
        say(f"{dtype}: {cell}".removeprefix("torch."))
        cases: dict[str, Case] = {OURS: our_case(model, cell)}
        cases |= {peer.name: peer_case(peer, cell, model.config.vocab) for peer in peers}
        timings = alternate(cases, rounds, min_seconds=0.0, max_rounds=rounds)
        tokens, roof = cell.context if cell.prefill else cell.batch, roofline(model, cell, roofs, dtype)
        name = str(dtype).removeprefix("torch.")
        rows += [Row(engine, name, cell, timing, tokens, roof) for engine, timing in timings.items()]
    return rows


def with_peers(
    models: Mapping[torch.dtype, Decoder],
    weights: Weights,
    folder: Path,
    names: Sequence[str],
    python: str,
    cells: Sequence[Cell],
    roofs: Roofs,
    *,
    rounds: int,
    say: Say,
) -> tuple[list[Row], dict[str, Any]]:
    """`compare` for each type, with the peers that can load it; facts of each peer, or why it is missing."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for dtype, model in models.items():
        name = str(dtype).removeprefix("torch.")
        with ExitStack() as stack:
            ready = []
            for peer_name in names:
                if name not in DTYPES[peer_name]:
                    facts[f"{peer_name} {name}"] = f"not offered (offers {', '.join(DTYPES[peer_name])})"
                    continue
                say(f"{name}: loading {peer_name}")
                peer = stack.enter_context(Peer(peer_name, python))
                try:
                    facts[f"{peer_name} {name}"] = peer.load(weights, folder, name, roofs.threads)
                    ready.append(peer)
                except RuntimeError as error:
                    facts[f"{peer_name} {name}"] = str(error)
            rows += compare(model, dtype, cells, roofs, ready, rounds=rounds, say=say)
    return rows, facts
