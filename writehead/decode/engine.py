"""What runs a model for decoding: a small interface, and the engine that runs it with PyTorch."""

import copy
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from writehead.core.bind import bound, itself, packed
from writehead.core.shapes import check_shape
from writehead.core.slots import Store
from writehead.core.state import State
from writehead.core.system import available_memory
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq

Model: TypeAlias = Decoder | Seq2Seq
PREFILL_TOKENS = 2048  # of all rows in one prefill call: bounds the activations


class Engine(Protocol):
    """Runs one model over states of its own making, which `core.state` can select and rewind.

    Tokens are int64, -1 = padding or an idle row, whose logits mean nothing. States are consumed.

    Attributes:
        name: for reports.
        vocab: width V of the logits.
        device: where tokens and logits live.
        positions: how many positions exist; None = any number.
        trained_context: tokens the model was made for; None = unknown.
        reads_source: does `start` need a source (an encoder-decoder model)?
        source_positions: how many positions a source may have; None = any number.
    """

    name: str
    vocab: int
    device: torch.device
    positions: int | None
    trained_context: int | None
    reads_source: bool
    source_positions: int | None

    def start(self, tokens: Tensor, store: Store, source: Tensor | None = None) -> tuple[Tensor, State]:
        """Prefill tokens (B, T), sources (B, S): logits (B, V) after each row's last token, and the state."""

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One more token a row, (B,): logits (B, V) after it, and the state."""

    def verify(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Several more tokens a row, (B, T): logits (B, T, V) after each of them, and the state."""

    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""

    def state_bytes(self, rows: int, context: int, store: Store) -> int:
        """Bytes of the caches of `rows` rows after `context` tokens each, as `store` allocates them."""

    def memory_bytes(self, sources: int, length: int) -> int:
        """Bytes that cross-attention keeps of so many sources of so many tokens; 0 without an encoder."""


class TorchEngine:
    """Runs a `Decoder` or `Seq2Seq` with PyTorch; the model is switched to evaluation.

    On a CPU float32 matrices get a packed copy when a batch or a short prefill first needs it, where memory
    allows: batches decode up to twice as fast for twice the weights' memory.
    """

    name = "torch"

    def __init__(
        self, model: Decoder | Seq2Seq, *, prefill_chunk: int | None = None, compile: bool = False
    ) -> None:
        """Wrap the model.

        Args:
            model: its weights are used in place.
            prefill_chunk: tokens a row that one call of prefill takes, default what makes up 2048 tokens in
                all rows, but at least 128; changes speed and memory, no result.
            compile: let inductor compile the dense parts of each layer at their first use (see `compiled`).

        Raises:
            ValueError: not a model that decodes, or a chunk below one token.
        """
        if not isinstance(model, Decoder | Seq2Seq):
            raise ValueError(f"{type(model).__name__} cannot decode; give a Decoder or a Seq2Seq")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1 token")
        model.eval()
        self.model, self.prefill_chunk = compiled(model) if compile else model, prefill_chunk
        self.decoder = self.model.decoder if isinstance(self.model, Seq2Seq) else self.model
        of = itself if compile else packed if self._has_room() else bound
        self._hidden, self._logits = self.decoder.bind(of), self.decoder.embedding.bind_logits(of)
        self.vocab, self.device = self.decoder.config.vocab, self.decoder.embedding.table.device
        self.positions = self.decoder.embedding.position.max_context
        self.trained_context = self.decoder.config.max_context
        self.reads_source = isinstance(model, Seq2Seq)
        self.source_positions = (
            model.encoder.embedding.position.max_context if isinstance(model, Seq2Seq) else None
        )

    @torch.inference_mode()
    def start(self, tokens: Tensor, store: Store, source: Tensor | None = None) -> tuple[Tensor, State]:
        """As `Engine.start`; only the last real token of a row goes through the output matrix.

        Raises:
            ValueError: a row without tokens, or a source that is missing or out of place.
        """
        check_shape("tokens", tokens, "B T")
        tokens = tokens.to(self.device)
        T, chunk = tokens.shape[1], self.prefill_chunk or max(128, PREFILL_TOKENS // len(tokens))
        last = torch.where(tokens >= 0, torch.arange(T, device=self.device), -1).amax(1)
        if int(last.min()) < 0:
            raise ValueError(f"row {int(last.argmin())} has no token to start from")
        state = self._empty(len(tokens), store, source)
        ends: list[Tensor] = []
        for first in range(0, T, chunk):
            x, state, _ = self._hidden(tokens[:, first : first + chunk], state)
            at = (last - first).clamp(0, x.shape[1] - 1)
            end = x[torch.arange(len(x), device=self.device), at]
            ends = [torch.where((last < first)[:, None], ends[0], end) if ends else end]
        return self._logits(ends[0]), state

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """As `Engine.step`."""
        x, state, _ = self._hidden(tokens[:, None], state)
        return self._logits(x[:, 0]), state

    @torch.inference_mode()
    def verify(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """As `Engine.verify`."""
        x, state, _ = self._hidden(tokens, state)
        return self._logits(x), state

    def weight_bytes(self) -> int:
        """As `Engine.weight_bytes`: tables of which only a few rows are read are left out."""
        embedding = self.decoder.embedding
        tables = [*embedding.position.parameters()]
        if embedding.output is not None:
            tables.append(embedding.table)
        if embedding.types is not None:
            tables.append(embedding.types)
        skipped = {id(table) for table in tables}
        return sum(p.nbytes for p in self.decoder.parameters() if id(p) not in skipped)

    def state_bytes(self, rows: int, context: int, store: Store) -> int:
        """As `Engine.state_bytes`."""
        itemsize, stack = self.decoder.embedding.table.itemsize, self.decoder.stack
        return 8 * rows + int(stack.state_bytes(rows, context, itemsize, store))  # type: ignore[operator]

    def memory_bytes(self, sources: int, length: int) -> int:
        """As `Engine.memory_bytes`."""
        itemsize = self.decoder.embedding.table.itemsize
        heads = (block.cross.qkv for block in self.decoder.blocks if block.cross is not None)
        per_token = sum(2 * qkv.kv_heads * qkv.head_dim for qkv in heads)
        return int(sources * length * per_token * itemsize)

    def _has_room(self) -> bool:
        """Is there memory for a packed copy of every matrix, and as much again for caches?"""
        there = available_memory()
        return there is None or 2 * self.weight_bytes() <= there

    def _empty(self, batch: int, store: Store, source: Tensor | None) -> State:
        if isinstance(self.model, Seq2Seq):
            if source is None or len(source) != batch:
                given = "none" if source is None else len(source)
                raise ValueError(
                    f"this model reads an encoder: {batch} rows need {batch} sources; got {given}"
                )
            return self.model.read(source.to(self.device), store)[0]
        if source is not None:
            raise ValueError("a source was given, but this model has no encoder")
        return self.model.init_state(batch, store)


def compiled(model: Model) -> Model:
    """A copy that shares the weights and whose projections and feed-forward layers inductor compiles.

    Attention stays as it is: what it does depends on positions, so a compiled whole would be compiled anew
    for call after call.
    """
    twin = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    for block in (twin.decoder if isinstance(twin, Seq2Seq) else twin).blocks:
        for part in (block.feedforward, getattr(block.mixer, "qkv", None)):
            if part is not None:
                part.compile(dynamic=True)
    return twin
