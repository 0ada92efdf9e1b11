"""A model's weights on the threads of the native library, by their addresses: nothing of PyTorch."""

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from writehead.core import system
from writehead.native import structs
from writehead.native.library import library
from writehead.native.outline import Layer, Normal, Outline

PREFILL_TOKENS = 512  # of all rows in one call: bounds the activations, and fills the matrix products
LARGEST_SIDE = 2**24  # of a matrix: the kernels count in 32 bits
FIRST_TURNS = 1024  # positions whose angles are computed at first


class Weights(Protocol):
    """Where a model's weights lie, by the names that we give them."""

    def matrix(self, name: str, n: int, k: int) -> structs.Matrix:
        """A packed matrix of n outputs and k inputs without its bias; a ValueError if there is none."""

    def vector(self, name: str, size: int) -> int | None:
        """The address of a vector of float32; None if there is none, a ValueError if it has another size."""


class Kernels:
    """Runs calls of one model.

    Attributes:
        outline: of the model.
        threads: that compute.
        instructions: the instruction set of the library.
    """

    def __init__(self, outline: Outline, weights: Weights, threads: int | None = None) -> None:
        """Start the threads.

        Args:
            outline: of the model.
            weights: are used where they lie.
            threads: that compute; default the physical cores that this process may use.

        Raises:
            ValueError: fewer than one thread, no library for this processor, or weights that are not the
                outline's.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        loaded, why = library()
        if loaded is None:
            raise ValueError(f"the native engine cannot run here: {why}")
        self.outline, self.threads, self.instructions = outline, threads or system.cores(), why
        self._library, self._weights = loaded, weights
        self._turns: NDArray[np.float32] | None = None
        self._alive: list[Any] = []  # what the kernels point to
        self._engine = loaded.wh_engine_create(ctypes.byref(self._describe()), self.threads)
        if not self._engine:
            raise ValueError(f"the native engine could not start {self.threads} threads; give fewer")
        weakref.finalize(self, loaded.wh_engine_free, self._engine)

    def call(
        self, caches: Sequence[structs.Cache], rows: int, next: int, top: int
    ) -> tuple[structs.Call, float]:
        """What is the same in all calls that take tokens into caches.

        Args:
            caches: one for each of the outline's; what they point to must live as long as the call is used.
            rows: of a batch.
            next: where each row's next position is, int64.
            top: no token of the first calls stands at this position or beyond.

        Returns:
            The call, and the position from which on it has no angles: `top` or above.
        """
        held = (structs.Cache * len(caches))(*caches)
        turns = self._turns_up_to(top)
        call = structs.Call(
            rows=rows,
            next=next,
            caches=held,
            turns=None if turns is None else turns.ctypes.data,
            logits_apart=structs.round_up(self.outline.vocab),
        )
        return call, math.inf if turns is None else len(turns)

    def run(self, call: structs.Call) -> None:
        """Take tokens into caches and make the logits that are wanted.

        Args:
            call: of `call`, with tokens and with room for their logits.

        Raises:
            MemoryError: there is none for the activations.
            ValueError: a token that is not in the vocabulary; nothing has changed then.
        """
        failed = self._library.wh_step(self._engine, call)
        if failed == structs.NO_TOKEN:
            size = self.outline.vocab
            ids = (ctypes.c_int64 * (call.rows * call.tokens)).from_address(call.ids)
            raise ValueError(f"token {max(ids)} is not in the vocabulary of {size} (0 to {size - 1})")
        if failed:
            raise MemoryError(f"no memory for a step of {call.rows} rows of {call.tokens} tokens")

    def _turns_up_to(self, top: int) -> NDArray[np.float32] | None:
        """The angles of so many positions or more; they stay where they are, since calls point to them."""
        rotation = self.outline.rotation
        if rotation is not None and (self._turns is None or len(self._turns) < top):
            self._turns = rotation.turns(max(FIRST_TURNS, 1 << (top - 1).bit_length()))
            self._alive.append(self._turns)
        return self._turns

    def _describe(self) -> structs.Model:
        outline = self.outline
        V, X, rotation = outline.vocab, outline.dim, outline.rotation
        head = "embedding.table" if outline.tied else "embedding.output"
        layers = (structs.Layer * len(outline.layers))(*map(self._layer, outline.layers))
        slopes = np.array(outline.slopes, np.float32) if outline.slopes else None
        self._alive += [layers, slopes]
        return structs.Model(
            depth=len(outline.layers),
            dim=X,
            vocab=V,
            parallel=outline.parallel,
            rotary=rotation.dim if rotation else 0,
            interleaved=rotation is not None and rotation.interleaved,
            embed_scale=outline.embed_scale,
            logit_scale=outline.logit_scale,
            embed_norm=self._norm(outline.embed_norm, X),
            last_norm=self._norm(outline.last_norm, X),
            table=self._matrix("embedding.table", V, X, ""),
            head=self._matrix(head, V, X, "embedding.bias"),
            slopes=None if slopes is None else slopes.ctypes.data,
            layers=layers,
        )

    def _layer(self, layer: Layer) -> structs.Layer:
        kept, X = self.outline.caches[layer.cache], self.outline.dim
        H, G, D = kept.heads, kept.kv_heads, kept.head_dim
        inner = 2 * structs.round_up(layer.hidden) if layer.gated else layer.hidden
        mixer, feed = f"{layer.name}.mixer", layer.inner
        return structs.Layer(
            self._linear(f"{mixer}.qkv", (H + 2 * G) * D, X),
            self._linear(f"{mixer}.out", X, H * D),
            self._linear(f"{feed}.inner", inner, X),
            self._linear(f"{feed}.outer", X, layer.hidden),
            *(self._norm(norm, width) for norm, width in zip(layer.norms, (X, X, D, D), strict=True)),
            layer.scale,
            layer.window,
            layer.lead,
            layer.cache,
            layer.place,
            layer.hidden,
            structs.ACTIVATIONS.index(layer.activation),
            layer.gated,
        )

    def _linear(self, name: str, n: int, k: int) -> structs.Matrix:
        return self._matrix(f"{name}.weight", n, k, f"{name}.bias")

    def _matrix(self, name: str, n: int, k: int, bias: str) -> structs.Matrix:
        if max(n, k) > LARGEST_SIDE:
            raise ValueError(f"{name} of {n} x {k} is too large: a side may have {LARGEST_SIDE}")
        found = self._weights.matrix(name, n, k)
        found.bias = self._weights.vector(bias, n)
        return found

    def _norm(self, norm: Normal, width: int) -> structs.Norm:
        if norm.kind == "none":
            return structs.Norm()
        weight, bias = (self._weights.vector(f"{norm.name}.{part}", width) for part in ("weight", "bias"))
        if weight is None:
            raise ValueError(f"the vector {norm.name}.weight is missing")
        return structs.Norm(structs.NORMS.index(norm.kind), norm.eps, weight, bias)
