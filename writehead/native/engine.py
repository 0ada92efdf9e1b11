"""The engine that runs a packed decoder with the native kernels."""

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from writehead.core import system
from writehead.core.positions import Positions
from writehead.core.shapes import check_shape
from writehead.core.slots import Store
from writehead.native import structs
from writehead.native.covers import Normal, outline
from writehead.native.formats import FORMATS, LANES, Packed
from writehead.native.library import library
from writehead.native.state import Cache, Kept, NativeState
from writehead.native.weights import PackedModel
from writehead.positions.alibi import ALiBi
from writehead.positions.base import has
from writehead.positions.rope import Rotary

PREFILL_TOKENS = 512  # of all rows in one call: bounds the activations, and fills the matrix products


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
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        self.outline, self.model = outline(model.config), model
        loaded, why = library()
        if loaded is None:
            raise ValueError(f"the native engine cannot run here: {why}")
        self.threads, self.instructions = threads or system.cores(), why
        self._library = loaded
        self.vocab, self.positions = model.config.vocab, self.outline.position.max_context
        self.trained_context = model.config.max_context
        self._turns: Tensor | None = None
        self._alive: list[Any] = []  # what the kernels point to
        self._engine = loaded.wh_engine_create(ctypes.byref(self._describe()), self.threads)
        if not self._engine:
            raise ValueError(f"the native engine could not start {self.threads} threads; give fewer")
        weakref.finalize(self, loaded.wh_engine_free, self._engine)

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
        caches = tuple(kept.empty(B, store) for kept in self.outline.caches)
        state = NativeState(torch.zeros(B, dtype=torch.int64), caches)
        logits = torch.empty(B, self.vocab)
        piece = max(1, PREFILL_TOKENS // B)
        for first in range(0, T, piece):
            part = tokens[:, first : first + piece]
            ends = torch.arange(first, first + part.shape[1]) == last[:, None]
            logits[ends.any(1)] = self._run(part, state, ends)
        return logits, state

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: NativeState) -> tuple[Tensor, NativeState]:
        """As `Engine.step`."""
        logits, state = self.verify(tokens[:, None], state)
        return logits[:, 0], state

    @torch.inference_mode()
    def verify(self, tokens: Tensor, state: NativeState) -> tuple[Tensor, NativeState]:
        """As `Engine.verify`."""
        check_shape("tokens", tokens, "B T", B=len(state.next))
        real = tokens >= 0
        found = self._run(tokens, state, real)
        if len(found) == tokens.numel():
            return found.view(*tokens.shape, -1), state
        logits = found.new_zeros(*tokens.shape, self.vocab)
        logits[real] = found
        return logits, state

    def weight_bytes(self) -> int:
        """As `Engine.weight_bytes`: tables of which only a few rows are read are left out."""
        looked_up = ["embedding.position.table"]
        if not self.model.config.tie_embeddings:
            looked_up.append("embedding.table")
        held: list[tuple[str, Packed | Tensor]] = [*self.model.matrices.items(), *self.model.vectors.items()]
        return sum(weight.nbytes for name, weight in held if name not in looked_up)

    def state_bytes(self, rows: int, context: int, store: Store) -> int:
        """As `Engine.state_bytes`."""
        return 8 * rows + sum(kept.nbytes(rows, store, context) for kept in self.outline.caches)

    def memory_bytes(self, sources: int, length: int) -> int:
        """As `Engine.memory_bytes`: the native engine runs no encoder."""
        return 0

    def _run(self, tokens: Tensor, state: NativeState, wanted: Tensor) -> Tensor:
        """Take tokens (B, T) into the state, in calls that its rings can take: the logits (N, V) wanted."""
        most = int(tokens.max()) if tokens.numel() else -1
        if most >= self.vocab:
            raise ValueError(f"token {most} is not in the vocabulary of {self.vocab} (0 to {self.vocab - 1})")
        B, T = tokens.shape
        piece = self.outline.piece or T
        if piece >= T:
            return self._call(tokens.contiguous(), state, wanted)
        order = wanted.flatten().cumsum(0).view(B, T) - 1
        logits = torch.empty(int(wanted.sum()), self.vocab)
        for first in range(0, T, piece):
            at = slice(first, first + piece)
            some = wanted[:, at]
            logits[order[:, at][some]] = self._call(tokens[:, at].contiguous(), state, some)
        return logits

    def _call(self, tokens: Tensor, state: NativeState, wanted: Tensor) -> Tensor:
        B, T = tokens.shape
        top = int(state.next.max()) + T
        places = self._places(tokens, state.next)
        state.caches = tuple(
            cache.resized(kept.grown(cache, top))
            for cache, kept in zip(state.caches, self.outline.caches, strict=True)
        )
        held = (structs.Cache * len(state.caches))(
            *(_cache(cache, kept) for cache, kept in zip(state.caches, self.outline.caches, strict=True))
        )
        wide = -(-self.vocab // LANES) * LANES
        logits = torch.empty(int(wanted.sum()), wide)
        flags = wanted.contiguous().view(torch.uint8)
        call = structs.Call(
            rows=B,
            tokens=T,
            ids=structs.pointer(tokens),
            next=structs.pointer(state.next),
            caches=held,
            turns=structs.pointer(self._turns_up_to(top)),
            places=structs.pointer(places),
            wanted=structs.pointer(flags),
            logits=structs.pointer(logits),
            logits_apart=wide,
        )
        if self._library.wh_step(self._engine, ctypes.byref(call)):
            raise MemoryError(f"no memory for a step of {B} rows of {T} tokens")
        for cache, after in zip(state.caches, held, strict=True):
            cache.used = after.used
        return logits[:, : self.vocab]

    def _places(self, tokens: Tensor, start: Tensor) -> Tensor | None:
        """What a scheme adds to the embeddings (B, T, X)."""
        position = self.outline.position
        if not has(position, "embed"):
            return None
        real = tokens >= 0
        pos = Positions(torch.where(real, start[:, None] + real.cumsum(1) - 1, -1))
        position.check_context(pos)
        table = self.model.vectors.get("embedding.position.table")
        if table is not None:
            return table[pos.index.clamp_min(0)]
        places = position.embed(pos, torch.float32)
        assert places is not None
        return places.contiguous()

    def _turns_up_to(self, top: int) -> Tensor | None:
        """Cosines and sines of positions below `top` and more (positions, R)."""
        position = self.outline.position
        if not isinstance(position, Rotary):
            return None
        if self._turns is None or len(self._turns) < top:
            positions = torch.arange(max(1024, 1 << (top - 1).bit_length()))
            self._turns = torch.cat(position.angles(positions, torch.float32), -1)
        return self._turns

    def _describe(self) -> structs.Model:
        config, position, vectors = self.model.config, self.outline.position, self.model.vectors
        layers = (structs.Layer * config.depth)()
        for to, layer in zip(layers, self.outline.layers, strict=True):
            to.qkv, to.out = self._matrix(f"{layer.name}.mixer.qkv"), self._matrix(f"{layer.name}.mixer.out")
            to.inner, to.outer = self._matrix(f"{layer.inner}.inner"), self._matrix(f"{layer.inner}.outer")
            to.norm, to.inner_norm, to.q_norm, to.k_norm = map(self._norm, layer.norms)
            to.scale, to.window, to.lead = layer.scale, layer.window, layer.lead
            to.cache, to.layer, to.hidden, to.gated = layer.cache, layer.place, layer.hidden, layer.gated
            to.activation = structs.ACTIVATIONS.index(layer.activation)
        slopes = torch.tensor(position.slope_list) if isinstance(position, ALiBi) else None
        self._alive += [layers, slopes]
        table = self.model.matrices["embedding.table"]
        head = table if config.tie_embeddings else self.model.matrices["embedding.output"]
        return structs.Model(
            depth=config.depth,
            dim=config.dim,
            vocab=config.vocab,
            parallel=self.outline.parallel,
            rotary=position.rotary_dim if isinstance(position, Rotary) else 0,
            interleaved=isinstance(position, Rotary) and position.pairs == "interleaved",
            embed_scale=config.embed_scale,
            logit_scale=config.logit_scale,
            embed_norm=self._norm(self.outline.embed_norm),
            last_norm=self._norm(self.outline.last_norm),
            table=structs.Matrix.of(table),
            head=structs.Matrix.of(head, vectors.get("embedding.bias")),
            slopes=structs.pointer(slopes),
            layers=layers,
        )

    def _matrix(self, name: str) -> structs.Matrix:
        return structs.Matrix.of(
            self.model.matrices[f"{name}.weight"], self.model.vectors.get(f"{name}.bias")
        )

    def _norm(self, norm: Normal) -> structs.Norm:
        weight, bias = (self.model.vectors.get(f"{norm.name}.{part}") for part in ("weight", "bias"))
        return structs.Norm(
            structs.NORMS.index(norm.kind), norm.eps, structs.pointer(weight), structs.pointer(bias)
        )


def _cache(cache: Cache, kept: Kept) -> structs.Cache:
    ring = 0 if cache.layout.window is None else cache.layout.window + cache.layout.slack
    k_scale, v_scale = cache.scales or (None, None)
    return structs.Cache(
        FORMATS.index(str(cache.k.dtype).removeprefix("torch.")),
        kept.layers,
        kept.heads,
        kept.kv_heads,
        kept.head_dim,
        cache.slots,
        cache.layout.lead,
        ring,
        cache.used,
        *map(structs.pointer, (cache.k, cache.v, k_scale, v_scale, cache.pos)),
    )
