"""The engine that runs a packed decoder with the native kernels."""

import torch
from torch import Tensor

from writehead.core.positions import Positions
from writehead.core.shapes import check_shape
from writehead.core.slots import Store
from writehead.native import structs
from writehead.native.covers import cover
from writehead.native.formats import Packed
from writehead.native.kernels import PREFILL_TOKENS, Kernels
from writehead.native.outline import TABLE
from writehead.native.state import Bound, NativeState, empty, nbytes
from writehead.native.weights import PackedModel


class Held:
    """The weights of a packed model where they lie in memory (see `kernels.Weights`)."""

    def __init__(self, model: PackedModel) -> None:
        self._model = model

    def matrix(self, name: str, n: int, k: int) -> structs.Matrix:
        """As `Weights.matrix`."""
        found = self._model.matrices.get(name)
        if found is None or (found.n, found.k) != (n, k):
            raise ValueError(f"no matrix {name} of {n} x {k}")
        return structs.Matrix.of(found)

    def vector(self, name: str, size: int) -> int | None:
        """As `Weights.vector`."""
        found = self._model.vectors.get(name)
        if found is not None and tuple(found.shape) != (size,):
            raise ValueError(f"{name} has the shape {tuple(found.shape)}; the model asks for {size} numbers")
        return structs.pointer(found)


class NativeEngine:
    """Runs a decoder with the native kernels (see `decode.engine.Engine`, whose methods it has)."""

    name = "native"
    reads_source = False
    source_positions: int | None = None
    device = torch.device("cpu")

    def __init__(self, model: PackedModel, *, threads: int | None = None) -> None:
        """Take a packed model.

        Args:
            model: its weights are used in place.
            threads: that compute; default the physical cores that this process may use.

        Raises:
            NotCoveredError: a model that the native engine does not run (a ValueError).
            ValueError: fewer than one thread, or no library for this processor.
        """
        self.outline, self._position = cover(model.config)
        self.model = model
        self._kernels = Kernels(self.outline, Held(model), threads)
        self.threads, self.instructions = self._kernels.threads, self._kernels.instructions
        self.vocab, self.positions = self.outline.vocab, self.outline.positions
        self.trained_context = self.outline.trained_context

    @torch.inference_mode()
    def start(self, tokens: Tensor, store: Store, source: Tensor | None = None) -> tuple[Tensor, NativeState]:
        """As `Engine.start`; only the last real token of a row goes through the output matrix.

        Raises:
            ValueError: a row without tokens, a source, or a type that caches are not kept in.
        """
        check_shape("tokens", tokens, "B T")
        if source is not None:
            raise ValueError("a source was given, but this model has no encoder")
        B, T = tokens.shape
        last = torch.where(tokens >= 0, torch.arange(T), -1).amax(1)
        if int(last.min()) < 0:
            raise ValueError(f"row {int(last.argmin())} has no token to start from")
        caches = tuple(empty(kept, B, store) for kept in self.outline.caches)
        state = NativeState(torch.zeros(B, dtype=torch.int64), caches)
        logits = torch.empty(B, self.vocab)
        piece = max(1, min(PREFILL_TOKENS // B, self.outline.piece or T))
        for first in range(0, T, piece):
            part = tokens[:, first : first + piece]
            ends = torch.arange(first, first + part.shape[1]) == last[:, None]
            logits[ends.any(1)] = self._call(part, state, ends)
        return logits, state

    def step(self, tokens: Tensor, state: NativeState) -> tuple[Tensor, NativeState]:
        """As `Engine.step`."""
        if tokens.shape != state.next.shape:  # the check takes a fifth of what Python adds to a step
            check_shape("tokens", tokens, "B", B=len(state.next))
        return self._call(tokens, state), state

    @torch.inference_mode()
    def verify(self, tokens: Tensor, state: NativeState) -> tuple[Tensor, NativeState]:
        """As `Engine.verify`."""
        check_shape("tokens", tokens, "B T", B=len(state.next))
        piece = self.outline.piece or max(1, tokens.shape[1])
        found = [self._call(part, state) for part in tokens.split(piece, 1)]
        return found[0] if len(found) == 1 else torch.cat(found, 1), state

    def weight_bytes(self) -> int:
        """As `Engine.weight_bytes`: tables of which only a few rows are read are left out."""
        looked_up = [TABLE]
        if not self.outline.tied:
            looked_up.append("embedding.table")
        held: list[tuple[str, Packed | Tensor]] = [*self.model.matrices.items(), *self.model.vectors.items()]
        return sum(weight.nbytes for name, weight in held if name not in looked_up)

    def state_bytes(self, rows: int, context: int, store: Store) -> int:
        """As `Engine.state_bytes`."""
        return 8 * rows + sum(nbytes(kept, rows, store, context) for kept in self.outline.caches)

    def memory_bytes(self, sources: int, length: int) -> int:
        """As `Engine.memory_bytes`: the native engine runs no encoder."""
        return 0

    def _call(self, tokens: Tensor, state: NativeState, wanted: Tensor | None = None) -> Tensor:
        """Take tokens (B,) or (B, T) into the state: the logits (.., V) of all, or (N, V) of those wanted.

        Between two steps a model's weights pass through all caches, so each call of PyTorch is slow here.
        """
        T = tokens.shape[1] if tokens.dim() == 2 else 1
        if state.bound is None or state.bound.top + T > state.bound.room:
            state.bound = self._bind(state, T)
        call, ids = state.bound.call, tokens.contiguous()
        if ids.dtype is not torch.int64:
            ids = ids.long()
        state.bound.top += T
        places = self._places(ids, state.next)
        rows = ids.shape if wanted is None else (int(wanted.sum()),)
        logits = torch.empty(*rows, call.logits_apart)
        call.tokens, call.ids, call.logits = T, structs.pointer(ids), structs.pointer(logits)
        call.places, call.wanted = structs.pointer(places), structs.pointer(wanted)
        self._kernels.run(call)
        return logits if call.logits_apart == self.vocab else logits[..., : self.vocab]

    @torch.inference_mode()
    def _bind(self, state: NativeState, tokens: int) -> Bound:
        """A state with room for so many more tokens a row, as the kernels take it."""
        top = int(state.next.max()) if len(state.next) else 0
        state.caches = tuple(cache.grown(top + tokens) for cache in state.caches)
        held = [cache.struct(kept) for cache, kept in zip(state.caches, self.outline.caches, strict=True)]
        room = min(cache.room for cache in state.caches)
        call, turns = self._kernels.call(held, len(state.next), state.next.data_ptr(), top + tokens)
        return Bound(call, top, min(room, turns))

    def _places(self, tokens: Tensor, start: Tensor) -> Tensor | None:
        """What a scheme adds to the embeddings of tokens (B,) or (B, T): (B, T, X)."""
        if self.outline.places == "none":
            return None
        real = (tokens if tokens.dim() == 2 else tokens[:, None]) >= 0
        pos = Positions(torch.where(real, start[:, None] + real.cumsum(1) - 1, -1))
        self._position.check_context(pos)
        if self.outline.places == "table":
            return self.model.vectors[TABLE][pos.index.clamp_min(0)]
        places = self._position.embed(pos, torch.float32)
        assert places is not None
        return places.contiguous()
