"""The laws of mixers, as functions of a built mixer: for the tests, `writehead check`, and users' own mixers.

A law runs on a copy of the mixer in float64 whose parameters are all disturbed, since a zero-initialised one
would hide a defect. Both sides of its equation are called alike in everything that the law is not about, so a
defect shows in the law it breaks and not in the others. Only `split` implies another law, `causal`: a call of
one token cannot know later ones.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from writehead.catalog import MIXERS, POSITIONS, Row, Spec, argument, build, find, load
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice
from writehead.core.slots import Store
from writehead.core.state import State
from writehead.laws import encode, kept
from writehead.laws.causal import causal, padding, select_rows, split
from writehead.laws.subject import TOLERANCE, BrokenError, Draw, Findings, Subject
from writehead.mixer import Aux
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq

DIM, LENGTH = 16, 29
TINY: Mapping[str, Any] = {
    "heads": 4,
    "window": 6,
    "segment": 4,
    "memory": 8,
    "compressed": 5,
    "chunk": 4,
    "rank": 2,
    "stride": 6,
    "columns": 2,
    "block": 4,
    "image_width": 8,
    "patch": [2, 4],
    "margin": [2, 4],
    "tokens": 2,
    "radius": 2,
    "clip": 2,
    "span": 3,
}  # a row's arguments when `check_row` builds it, at any depth


class Law(NamedTuple):
    """What a law says, and the function that compares its two sides."""

    says: str
    test: Callable[[Subject, Draw], Findings]


LAWS: Mapping[str, Law] = MappingProxyType(
    {
        "split": Law("calls of any sizes give the outputs, later behaviour and gradients of one call", split),
        "causal": Law("changing token t changes no output before t", causal),
        "select": Law(
            "a row depends on itself only; rows may be moved, repeated, dropped, joined", select_rows
        ),
        "padding": Law("a token at position -1 changes nothing but its own output", padding),
        "budget": Law("the state holds the bytes predicted and grows as declared", kept.budget),
        "rewind": Law(
            "a rewound state is the one before the tokens taken back, or says it cannot", kept.rewinds
        ),
        "encode rows": Law("a row of a bidirectional call depends on itself only", encode.rows),
        "encode padding": Law("padding changes nothing in a bidirectional call", encode.padding),
    }
)
ENCODING = ("encode rows", "encode padding")
DECODING = tuple(law for law in LAWS if law not in ENCODING)


@dataclass(frozen=True)
class Verdict:
    """How one law fared on one mixer.

    Attributes:
        row: the catalog row, or the mixer's class.
        law: one of `LAWS`.
        passed: does the law hold?
        deviation: the worst one found, relative to the larger of 1 and the values compared; None where a law
            failed without a number to show (an error, a missing method, not-a-number).
        detail: what deviated most, or what went wrong.
    """

    row: str
    law: str
    passed: bool
    deviation: float | None
    detail: str


def check(
    mixer: Any,
    law: str,
    *,
    dim: int = DIM,
    seed: int = 0,
    store: Store = Store(),
    decodes: str | None = None,
    length: int = LENGTH,
    name: str | None = None,
) -> Verdict:
    """Try one law on a mixer; the mixer itself is left as it is.

    Args:
        mixer: has `init_state` and `forward` (`mixer.CausalMixer`), `encode` (`mixer.EncoderMixer`), or
            `remember` and `forward` (cross-attention).
        law: one of `LAWS`.
        dim: the mixer's width X.
        seed: of the tokens, the cuts and the disturbance of the parameters.
        store: how its caches are kept; with fewer bits than float64, `split` looks at no gradients.
        decodes: the growth declared for its state, such as "O(S)" or "O(W)"; None = nothing declared.
        length: tokens of the main call, at least 13; to see a window slide it must be longer than the window.
        name: what the verdict calls the mixer; default its class.

    Raises:
        ValueError: an unknown law or too small a length. What the mixer raises is a verdict.
    """
    check_choice("law", law, LAWS)
    if length < 13:
        raise ValueError(f"length={length} is too short to cut, gap and join; it must be at least 13")
    draw, row = Draw(seed, dim), name or type(mixer).__name__
    worst, most, count = 0.0, "", 0
    try:
        lacks = [m for m in (("encode",) if law in ENCODING else ("forward",)) if not hasattr(mixer, m)]
        if lacks:
            raise BrokenError(f"the mixer has no {lacks[0]}")
        for what, deviation in LAWS[law].test(Subject(mixer, draw, store, decodes, length), draw):
            count += 1
            if deviation >= worst:
                worst, most = deviation, what
    except BrokenError as error:
        return Verdict(row, law, False, None, str(error))
    except Exception as error:
        return Verdict(row, law, False, None, f"{type(error).__name__}: {error}")
    detail = f"{count} comparisons; the worst: {most}"
    return Verdict(row, law, worst <= TOLERANCE, worst if math.isfinite(worst) else None, detail)


def laws_for(row: Row | str) -> tuple[str, ...]:
    """The laws that apply to a row of the catalog's mixers."""
    row = find(MIXERS, row) if isinstance(row, str) else row
    encodes = ENCODING if hasattr(load(row), "encode") else ()
    return encodes if row.decodes == "encode" else (*DECODING, *encodes)


def check_row(
    row: Row | str,
    *,
    laws: Sequence[str] | None = None,
    position: Spec = MappingProxyType({"name": "rotary"}),
    store: Store = Store(),
    seed: int = 0,
) -> list[Verdict]:
    """Build a row of the catalog at a tiny size and try its laws.

    Args:
        row: of the catalog's mixers, or its name.
        laws: which ones; default all that apply.
        position: the position scheme, for mixers that take one.
        store: how caches are kept.
        seed: of weights, tokens and cuts.

    Raises:
        ValueError: unknown row, law or position.
    """
    row = find(MIXERS, row) if isinstance(row, str) else row
    for law in laws or ():
        check_choice("law", law, LAWS)
    mixer = build_tiny(row, position, seed)
    return [
        check(mixer, law, seed=seed, store=store, decodes=row.decodes, name=row.name)
        for law in laws_for(row)
        if laws is None or law in laws
    ]


def build_tiny(row: Row, position: Spec, seed: int = 0) -> nn.Module:
    """The row's mixer with width `DIM` and the arguments in `TINY`."""
    takes = inspect.signature(load(row)).parameters
    spec = {"name": row.name, **{k: v for k, v in TINY.items() if k in takes}, **_shrunk(row.preset)}
    heads = argument(MIXERS, spec, "heads") or TINY["heads"]
    bidirectional = row.decodes == "encode"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scheme = build(
            POSITIONS, position, dim=DIM, heads=heads, head_dim=DIM // heads, bidirectional=bidirectional
        )
        mixer: nn.Module = build(MIXERS, spec, dim=DIM, position=scheme)
    return mixer


def _shrunk(preset: Any) -> Any:
    if isinstance(preset, Mapping):
        return {k: v if v is None else TINY.get(k, _shrunk(v)) for k, v in preset.items()}
    return [_shrunk(v) for v in preset] if isinstance(preset, list | tuple) else preset


class Layers(nn.Module):
    """A decoder's layers and embedded positions as one mixer, whose x stands in for the token embeddings."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> State:
        return self.decoder.init_state(batch, store).layers

    def forward(self, x: Tensor, pos: Positions, state: State = None) -> tuple[Tensor, State, Aux]:
        places = self.decoder.embedding.position.embed(pos, x.dtype)
        state = self.init_state(len(x), x) if state is None else state
        y, state, aux = self.decoder.stack(x if places is None else x + places, pos, state)
        return y, state, aux


class ReadingLayers(Layers):
    """The same of a model that reads: its source, encoded, is what `remember` keeps."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__(model.decoder)
        self.encoder = model.encoder

    def remember(self, source: Tensor, pos: Positions) -> State:
        places = self.encoder.embedding.position.embed(pos, source.dtype)
        x, _ = self.encoder.stack.encode(source if places is None else source + places, pos)  # type: ignore[operator]
        memories = tuple(block.cross.remember(x, pos) for block in self.decoder.blocks)
        return self.decoder.init_state(len(source), memories=memories).layers
