"""From which length on a mechanism is faster than dense attention, and how its time and memory grow.

One layer with one head of 64 and one row, in training (forward and backward) and in decoding (one token
behind a past). Memory is counted in bytes of tensors (`live.peak`); theory is the mixer's own count of
operations. A series ends where it takes more than `HOPELESS` times as long as dense attention at the same
length, or where it would hold more than `MOST_BYTES`; what is not there was not measured.

How time grows is measured apart, as the processor's seconds of one thread in rounds over the lengths: other
jobs and a processor that changes its speed disturb that least.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from writehead.bench.live import peak
from writehead.catalog import MIXERS, build
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import detach
from writehead.core.work import Call

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
FITTED = 4096  # slopes are those from so many tokens on
WIDTH, HOPELESS, MOST_BYTES = 64, 4.0, 4 << 30
ROUNDS, LONG_S = 3, 2.0  # samples of a cell; one that takes longer than LONG_S has a single sample
PATIENCE_S = 10.0  # of the processor; lengths beyond one that takes longer are left out
DENSE, DENSE_ENCODER = "mha", "bidirectional"
PARTS = ("train", "decode", "memory", "processor")


@dataclass(frozen=True)
class Subject:
    """A mechanism: the arguments of its mixer at a length, how it is used, and bytes a pair of tokens."""

    spec: Callable[[int], Mapping[str, Any]]
    causal: bool = True
    pair_bytes: int = 0  # held in training for every pair of tokens


def _of(name: str, causal: bool = True, pair_bytes: int = 0, **options: Any) -> Subject:
    return Subject(lambda T: {"name": name, **options}, causal, pair_bytes)


def _long(name: str, causal: bool = True, pair_bytes: int = 0, **options: Any) -> Subject:
    """One that has weights for positions, as many as there are tokens."""
    spec = lambda T: {"name": name, "max_context": T, **options}  # noqa: E731
    return Subject(spec, causal, pair_bytes)


SUBJECTS: Mapping[str, Subject] = {
    DENSE: _of(DENSE),
    "linear": _of("linear"),
    "performer": _of("performer", features=64),
    "performer_relu": _of("performer_relu", features=64),
    "rfa": _of("rfa", features=32),
    "rfa_gate": _of("rfa_gate", features=32),
    "luna": _of("luna"),
    "linformer_prefix": _long("linformer_prefix"),
    "transformer_xl": _of("transformer_xl"),
    "sliding_xl": _of("sliding_xl"),
    "compressive": _of("compressive"),
    "most_used": _of("most_used"),
    "long_short": _of("long_short"),
    "synthesizer_dense": _long("synthesizer_dense", pair_bytes=24),
    "synthesizer_random": _long("synthesizer_random", pair_bytes=24),
    "factorised_dense": _long("factorised_dense", pair_bytes=24),
    "factorised_random": _long("factorised_random", pair_bytes=24),
    "synthesizer_mixed": _long("synthesizer_mixed", pair_bytes=32),
    DENSE_ENCODER: _of(DENSE_ENCODER, False),
    "linformer": _long("linformer", False),
    "nystromformer": _of("nystromformer", False),
    "luna_encoder": _of("luna_encoder", False),
    "long_short_encoder": _of("long_short_encoder", False),
    "linear, both sides": _of("linear", False),
    "performer, both sides": _of("performer", False, features=64),
}


@dataclass(frozen=True)
class Cell:
    """One mechanism at one length.

    Attributes:
        name, tokens: what was measured; tokens of the call, or of the past that one token reads.
        part: of `PARTS`.
        forward_s, seconds: least seconds of the forward pass under autograd, and of the whole; the
            processor's in that part.
        samples: of which they are the least.
        peak_bytes: of tensors, memory only.
        flops: operations by the mixer's own formula, forward.
        over: why the series ends here, if it does.
    """

    name: str
    tokens: int
    part: str
    forward_s: float = math.nan
    seconds: float = math.nan
    samples: int = 0
    peak_bytes: int = 0
    flops: int = 0
    over: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def dense_of(name: str) -> str:
    """The dense attention that a mechanism is compared with."""
    return DENSE if SUBJECTS[name].causal else DENSE_ENCODER


def make(name: str, tokens: int) -> nn.Module:
    """The mechanism's mixer for a length, with one head of `WIDTH`."""
    torch.manual_seed(0)
    spec = {**SUBJECTS[name].spec(tokens), "heads": 1}
    mixer: nn.Module = build(MIXERS, spec, dim=WIDTH, position=None)
    return mixer


def _forward(mixer: Any, x: torch.Tensor, causal: bool) -> torch.Tensor:
    pos = Positions.range(1, 0, x.shape[1])
    if not causal:
        encoded: torch.Tensor = mixer.encode(x, pos)[0]
        return encoded
    y: torch.Tensor
    if hasattr(mixer, "whole"):
        y, aux = mixer.whole(x, pos)
    else:
        y, state, aux = mixer(x, pos)
        detach(state)
    return y + aux["reconstruction"] if "reconstruction" in aux else y


def _train(
    mixer: nn.Module, tokens: int, causal: bool, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    start = clock()
    x = torch.randn(1, tokens, WIDTH, requires_grad=True)
    y = _forward(mixer, x, causal)
    middle = clock()
    wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    torch.autograd.grad(y.sum(), wanted, allow_unused=True)
    return middle - start, clock() - start


def _least(name: str, tokens: int, part: str, samples: Sequence[tuple[float, float]], mixer: Any) -> Cell:
    forward, both = (min(times) for times in zip(*samples, strict=True))
    flops = mixer.work(Call(tokens=tokens)).flops
    return Cell(name, tokens, part, forward, both, len(samples), flops=flops)


def train_cell(name: str, tokens: int) -> Cell:
    """Time of both passes over a row of `tokens`."""
    mixer, causal = make(name, tokens), SUBJECTS[name].causal
    _train(mixer, min(tokens, 256), causal)
    samples: list[tuple[float, float]] = []
    while len(samples) < ROUNDS and (not samples or sum(both for _, both in samples) < LONG_S):
        samples.append(_train(mixer, tokens, causal))
    return _least(name, tokens, "train", samples, mixer)


def processor_cells(name: str, lengths: Sequence[int]) -> list[Cell]:
    """The processor's seconds of both passes over rows of so many tokens, on one thread, in rounds."""
    mixers = {tokens: make(name, tokens) for tokens in sorted(lengths)}
    samples: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in mixers}
    threads, last = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for tokens in sorted(samples):
                if tokens > last:
                    continue
                samples[tokens].append(
                    _train(mixers[tokens], tokens, SUBJECTS[name].causal, time.process_time)
                )
                if samples[tokens][-1][1] > PATIENCE_S:
                    last = min(last, tokens)
    finally:
        torch.set_num_threads(threads)
    return [_least(name, n, "processor", found, mixers[n]) for n, found in samples.items() if found]


def peak_cell(name: str, tokens: int) -> Cell:
    """Bytes of tensors of both passes."""
    held = peak(partial(_train, make(name, tokens), tokens, SUBJECTS[name].causal))
    return Cell(name, tokens, "memory", peak_bytes=held)


@torch.inference_mode()
def decode_cell(name: str, tokens: int) -> Cell:
    """Time of one token behind a past of `tokens`."""
    mixer: Any = make(name, tokens + 4096)
    run, piece = mixer.bind(), 1024
    state = mixer.init_state(1, torch.zeros(1, 1, WIDTH), Store(capacity=tokens + 4096))
    x = torch.randn(1, piece, WIDTH)
    for first in range(0, tokens, piece):
        size = min(piece, tokens - first)
        _, state, _ = run(x[:, :size], Positions.range(1, first, first + size), state)
    token, samples, at = x[:, :1], [], tokens
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(32):
            _, state, _ = run(token, Positions.range(1, at, at + 1), state)
            at += 1
        samples.append((time.perf_counter() - start) / 32)
    flops = mixer.work(Call(tokens=1, context=tokens)).flops
    return Cell(name, tokens, "decode", seconds=min(samples[1:]), samples=8 * 32, flops=flops)


def study(
    names: Iterable[str],
    lengths: Sequence[int] = LENGTHS,
    parts: Sequence[str] = PARTS,
    *,
    known: Sequence[Cell] = (),
    keep: Callable[[Cell], None] = lambda cell: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Measure mechanisms, the dense ones first, since series end by comparison with them.

    Args:
        names: of `SUBJECTS`.
        lengths: tokens.
        parts: of `PARTS`.
        known: cells of earlier runs, whose dense ones count.
        keep: given each cell when it is there.
        say: told what happens, before it happens.
    """
    measure = {"train": train_cell, "decode": decode_cell, "memory": peak_cell}
    cells: list[Cell] = []
    order = sorted(names, key=lambda name: name not in (DENSE, DENSE_ENCODER))
    for part in parts:
        for name in order:
            if part == "decode" and not SUBJECTS[name].causal:
                continue
            if part == "processor":
                fitted = [n for n in sorted(lengths) if n >= FITTED and not _stop(name, n, part, [])]
                say(f"{part}: {name}, {fitted} tokens")
                for cell in processor_cells(name, fitted):
                    cells.append(cell)
                    keep(cell)
                continue
            for tokens in sorted(lengths):
                reason = _stop(name, tokens, part, [*known, *cells])
                say(f"{part}: {name}, {tokens} tokens")
                cells.append(Cell(name, tokens, part, over=reason) if reason else measure[part](name, tokens))
                keep(cells[-1])
                if reason:
                    break
    return cells


def _stop(name: str, tokens: int, part: str, cells: Sequence[Cell]) -> str:
    """Why a series ends before this length; "" if it goes on."""
    held = SUBJECTS[name].pair_bytes * tokens**2
    if held > MOST_BYTES and part != "decode":
        return f"training would hold about {held / 2**30:.0f} GiB"
    if SUBJECTS[name].spec(tokens)["name"] in ("synthesizer_random", "synthesizer_mixed") and tokens > 16384:
        return f"its table of scores would take {tokens**2 * 4 / 2**30:.0f} GiB"
    mine, dense = ([c for c in cells if (c.name, c.part) == (n, part)] for n in (name, dense_of(name)))
    if part != "memory" and name != dense_of(name) and mine:
        last = mine[-1]
        same = next((c for c in dense if c.tokens == last.tokens), None)
        if last.tokens >= FITTED * 2 and same and last.seconds > HOPELESS * same.seconds:
            return f"{last.seconds / same.seconds:.1f} times as long as dense attention at {last.tokens}"
    return ""
