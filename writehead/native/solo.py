"""The native engine for one text, in NumPy: importing PyTorch takes longer than reading a short prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from writehead.native import structs
from writehead.native.kernels import PREFILL_TOKENS, Kernels, Weights
from writehead.native.outline import Kept, Outline

STORED = "float32"  # how keys and values are kept

Array = NDArray[Any]


@dataclass
class SoloCache:
    """Keys (1, L, G, S/16, D, 16), values (1, L, G, S/16, 16, D) and positions (1, S) of layers that keep the
    same tokens, float32."""

    k: Array
    v: Array
    pos: Array


@dataclass
class SoloState:
    """What one text leaves behind.

    Attributes:
        next: (1,) int64, the position of its next token.
        caches: of the outline's caches, with room for `room` tokens.
        room: tokens that it can take.
        call: what is the same in all calls of the kernels.
    """

    next: Array
    caches: list[SoloCache]
    room: int
    call: structs.Call


class SoloEngine:
    """Runs one row of a decoder with the native kernels.

    Attributes:
        vocab, positions, trained_context: see `decode.limits.Limits`.
        threads, instructions: of the kernels.
    """

    name = "native"

    def __init__(
        self, outline: Outline, weights: Weights, table: Array | None, threads: int | None = None
    ) -> None:
        """Start the threads.

        Args:
            outline: of the model, whose places are no function.
            weights: are used where they lie.
            table: (positions, X) rows that are added to embeddings, if the outline has such places.
            threads: that compute; default the physical cores that this process may use.

        Raises:
            ValueError: as `Kernels`, or places that are a function of the position.
        """
        if outline.places == "function" or (outline.places == "table") != (table is not None):
            raise ValueError(f"places that are {outline.places!r} cannot be added here")
        self.outline, self._kernels, self._table = outline, Kernels(outline, weights, threads), table
        self.threads, self.instructions = self._kernels.threads, self._kernels.instructions
        self.vocab, self.positions = outline.vocab, outline.positions
        self.trained_context = outline.trained_context

    def empty(self, room: int) -> SoloState:
        """The state before a text of at most `room` tokens."""
        next = np.zeros(1, np.int64)
        caches = [_empty(kept, room) for kept in self.outline.caches]
        held = [_struct(kept, cache) for kept, cache in zip(self.outline.caches, caches, strict=True)]
        call, _ = self._kernels.call(held, 1, next.ctypes.data, room)
        return SoloState(next, caches, room, call)

    def state_bytes(self, context: int) -> int:
        """Bytes of the caches after `context` tokens."""
        return 8 + sum(kept.nbytes(1, _slots(kept, context), STORED) for kept in self.outline.caches)

    def feed(self, tokens: Sequence[int], state: SoloState) -> tuple[Array, SoloState]:
        """Take tokens into the state.

        Args:
            tokens: at least one.
            state: is consumed.

        Returns:
            Logits (V,) float32 after the last token, and the state.

        Raises:
            ValueError: a token that does not exist, or more tokens than the state has room for.
        """
        given = np.array(tokens, np.int64)
        if not len(given) or given.min() < 0 or given.max() >= self.vocab:
            raise ValueError(f"tokens must be 1 or more of 0 to {self.vocab - 1}; got {list(tokens)}")
        top, there = int(state.next[0]) + len(given), self.positions
        if top > state.room:
            raise ValueError(f"{len(given)} more tokens than a state with room for {state.room} can take")
        if there is not None and top > there:
            raise ValueError(f"position {top - 1} does not exist: this model has {there} (0 to {there - 1})")
        step = min(PREFILL_TOKENS, self.outline.piece or PREFILL_TOKENS)
        logits = np.empty((1, structs.round_up(self.vocab)), np.float32)
        for first in range(0, len(given), step):
            self._call(given[first : first + step], state, logits, last=first + step >= len(given))
        return logits[0, : self.vocab], state

    def _call(self, ids: Array, state: SoloState, logits: Array, last: bool) -> None:
        top = int(state.next[0]) + len(ids)
        wanted = np.zeros(len(ids), np.uint8)
        wanted[-1] = last
        places = None if self._table is None else np.ascontiguousarray(self._table[top - len(ids) : top])
        call = state.call
        call.tokens, call.ids, call.logits = len(ids), ids.ctypes.data, logits.ctypes.data
        call.places, call.wanted = None if places is None else places.ctypes.data, wanted.ctypes.data
        self._kernels.run(call)


def _slots(kept: Kept, room: int) -> int:
    return structs.round_up(room if kept.window is None else min(room, kept.lead + kept.ring()))


def _empty(kept: Kept, room: int) -> SoloCache:
    slots = _slots(kept, room)
    k, v = map(_zeros, kept.shapes(1, slots, STORED))
    return SoloCache(k, v, np.full((1, slots), -1, np.int32))


def _zeros(shape: tuple[int, ...]) -> Array:
    """Float32 zeros that begin at a multiple of 64 bytes, as the vectors of the processor like it."""
    size = 4 * prod(shape)
    memory = np.zeros(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size].view(np.float32).reshape(shape)


def _struct(kept: Kept, cache: SoloCache) -> structs.Cache:
    return structs.Cache(
        structs.FORMATS.index(STORED),
        kept.layers,
        kept.heads,
        kept.kv_heads,
        kept.head_dim,
        cache.pos.shape[1],
        kept.lead,
        kept.ring(),
        cache.k.ctypes.data,
        cache.v.ctypes.data,
        None,
        None,
        cache.pos.ctypes.data,
    )
