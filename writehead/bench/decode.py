"""How fast models decode: our engines in cells of batch and context, beside the roofline and other engines.

Every cell is measured in turns (ours, peer, peer, ours, ...), so a noisy machine meets all engines alike;
ratios of one run are firm, absolute figures are not. Each figure stands beside its limit: the larger of
bytes over bandwidth and operations over rate, both measured in turns with it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from writehead.bench.limits import Limits
from writehead.bench.machine import Roofs, roofline_seconds
from writehead.bench.measure import Case, Timing, alternate
from writehead.bench.neighbour import Beside, beside
from writehead.bench.ours import FLOATS, Ours, Scores, contestants
from writehead.bench.peers import DTYPES, Peer, Weights
from writehead.bench.quality import Quality, judge
from writehead.core.slots import Store
from writehead.core.work import Call
from writehead.costs import costs
from writehead.model.decoder import Decoder

KINDS = (*FLOATS, "int8", "int4")
STEPS = 8  # decode steps of one sample
BUDGET_S = 90.0  # a cell that takes longer gets two rounds
Say = Callable[[str], None]


class Contestant(Protocol):
    """What can be measured: one of our engines or a peer."""

    name: str

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from an empty cache to the logits of the last token."""

    def decode(self, context: int, batch: int, new_tokens: int) -> float:
        """Seconds of a step."""

    def score(self, ids: Sequence[int]) -> Scores:
        """Best next tokens and log-probabilities of a text."""


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

    @classmethod
    def read(cls, text: str) -> "Cell":
        """The cell that "16@128" or "prefill@1024" names.

        Raises:
            ValueError: another form.
        """
        batch, _, context = text.partition("@")
        if context.isdigit() and int(context) and (batch == "prefill" or (batch.isdigit() and int(batch))):
            return cls(0 if batch == "prefill" else int(batch), int(context))
        raise ValueError(f"cell {text!r} is not BATCH@CONTEXT or prefill@TOKENS, for instance 1@128")


CELLS = (Cell(1, 128), Cell(1, 2048), Cell(16, 128), Cell(64, 128), Cell(0, 1024), Cell(0, 4096))


@dataclass(frozen=True)
class Row:
    """One engine in one cell.

    Attributes:
        engine, dtype, cell: what was measured.
        timing: seconds of a step, or of a whole prefill.
        tokens: tokens of that step or prefill.
        roof_s: the least time the machine allowed for it meanwhile with our weights and caches; the same for
            all engines of a type.
        roofs: what it follows from.
    """

    engine: str
    dtype: str
    cell: Cell
    timing: Timing
    tokens: int
    roof_s: float
    roofs: Roofs

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
            "roofs": self.roofs.to_dict(),
            "timing": asdict(self.timing),
        }


def case(contestant: Contestant, cell: Cell, vocab: int) -> Case:
    """A callable that runs the cell once and gives its seconds."""
    if cell.prefill:
        return partial(contestant.prefill, [token % (vocab - 1) for token in range(cell.context)])
    return partial(contestant.decode, cell.context, cell.batch, STEPS)


@dataclass(frozen=True)
class Need:
    """The least that a cell takes, whatever the engine.

    Attributes:
        moved: bytes that are read and written.
        flops: operations.
        dtypes: types that lose none of the weights; products may run in the fastest.
    """

    moved: int
    flops: float
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, model: Decoder, cell: Cell, dtype: str, weight_bytes: int, cache: torch.dtype) -> "Need":
        """What a cell needs.

        Args:
            model: its shape.
            cell: what is measured.
            dtype: of the weights.
            weight_bytes: that a step reads; 0 = float32 weights.
            cache: type of keys and values.
        """
        call = Call(
            batch=max(cell.batch, 1),
            tokens=cell.context if cell.prefill else 1,
            context=0 if cell.prefill else cell.context,
            logits=1,
            store=Store(dtype=cache),
        )
        cost = costs(model, call)
        moved = cost.moved + (weight_bytes - cost.weight_bytes if weight_bytes else 0)
        own = "int8" if dtype in ("int8", "int4") else dtype
        return cls(moved, cost.flops, tuple(dict.fromkeys(("float32", own))))

    def seconds(self, roofs: Roofs) -> float:
        """The least time on a machine with these limits."""
        fastest = max(set(self.dtypes) & set(roofs.matmul), key=roofs.rate)
        return roofline_seconds(self.moved, self.flops, roofs, self.moved, dtype=fastest)


def compare(
    model: Decoder,
    kind: str,
    cells: Iterable[Cell],
    ours: Sequence[Ours],
    peers: Sequence[Peer] = (),
    *,
    rounds: int = 5,
    say: Say = lambda text: None,
) -> list[Row]:
    """Measure each cell on our engines and on loaded peers, in turns with the machine's limits.

    Args:
        model: its shape.
        kind: type of the weights of all engines.
        cells: what to measure.
        ours: our engines, the one to compare others with first.
        peers: loaded with the same weights.
        rounds: samples of each engine and cell; two for a cell that takes long.
        say: told what happens, before it happens.
    """
    rows = []
    for cell in cells:
        say(f"{kind}: {cell}")
        entrants: list[Contestant] = [*ours, *peers]
        cases = {entrant.name: case(entrant, cell, model.config.vocab) for entrant in entrants}
        first = ours[0]
        need = Need.of(model, cell, kind, first.engine.weight_bytes(), first.cache or torch.float32)
        limits = Limits(need.moved, need.dtypes)
        every = {**limits.cases, **cases}
        timings = alternate(every, rounds, min_seconds=0.0, max_rounds=rounds, budget_s=BUDGET_S)
        tokens, roofs = cell.context if cell.prefill else cell.batch, limits.roofs(timings)
        roof = need.seconds(roofs)
        rows += [Row(engine, kind, cell, timings[engine], tokens, roof, roofs) for engine in cases]
    return rows


@dataclass(frozen=True)
class Run:
    """What to measure.

    Attributes:
        model: float32 weights, or blank if `source` is given.
        kinds: types of weights, out of KINDS.
        cells: batches and contexts.
        peers: names of other engines, in `python`, on `weights` whose converted forms stay in `folder`.
        text: token pieces on which the engines are judged; none = speed only.
        rounds, threads: samples, and threads of every engine.
        source: files of a model so large that only the native engine is to read it.
    """

    model: Decoder
    kinds: Sequence[str]
    cells: Sequence[Cell]
    peers: Sequence[str] = ()
    python: str = ""
    weights: Weights | None = None
    folder: Path = Path()
    text: Sequence[list[int]] = ()
    rounds: int = 5
    threads: int = 1
    source: Path | None = None

    def ours(self, kind: str) -> list[Ours]:
        """Our engines in a type."""
        return list(contestants(self.model, kind, self.threads, self.source))


def measure(run: Run, say: Say) -> tuple[list[Row], list[Quality], dict[str, Any]]:
    """Rows and qualities of all engines, and facts of each peer, or why it is missing."""
    rows: list[Row] = []
    judged: list[Quality] = []
    facts: dict[str, Any] = {}
    reference: list[Scores] = []
    for kind in run.kinds:
        with ExitStack() as stack:
            ours = run.ours(kind)
            peers = list(_peers(run, kind, stack, facts, say))
            if run.text and not reference:
                say("scoring the text in float32")
                exact = ours[-1] if kind == "float32" else run.ours("float32")[-1]
                reference = [exact.score(piece) for piece in run.text]
            rows += compare(run.model, kind, run.cells, ours, peers, rounds=run.rounds, say=say)
            entrants: list[Contestant] = [*ours, *peers]
            for entrant in entrants if run.text else ():
                say(f"{kind}: {entrant.name} reads the text")
                judged.append(judge(entrant, kind, run.text, reference))
    return rows, judged, facts


def _peers(run: Run, kind: str, stack: ExitStack, facts: dict[str, Any], say: Say) -> Iterable[Peer]:
    assert run.weights is not None or not run.peers
    for name in run.peers:
        if kind not in DTYPES[name]:
            facts[f"{name} {kind}"] = f"not offered (offers {', '.join(DTYPES[name])})"
            continue
        say(f"{kind}: loading {name}")
        peer = stack.enter_context(Peer(name, run.python))
        try:
            facts[f"{name} {kind}"] = peer.load(run.weights, run.folder, kind, run.threads)  # type: ignore[arg-type]
            yield peer
        except RuntimeError as error:
            facts[f"{name} {kind}"] = str(error)


def beside_busy(run: Run, say: Say) -> list[Beside]:
    """Decoding at batch 1 in int8 beside one busy core: our native engine and llama.cpp."""
    kind, facts = "int8", dict[str, Any]()
    cell = Cell(1, 128)
    with ExitStack() as stack:
        entrants: list[Contestant] = [*run.ours(kind)]
        entrants += _peers(
            replace(run, peers=[p for p in run.peers if p == "llama.cpp"]), kind, stack, facts, say
        )
        say(f"{kind}: {cell} beside a busy core")
        cases = {each.name: case(each, cell, run.model.config.vocab) for each in entrants}
        return beside(cases, rounds=run.rounds)
