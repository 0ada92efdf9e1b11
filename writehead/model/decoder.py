"""A causal language model: tokens in, logits out, one call for training, prefill and decoding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from writehead.config import ModelConfig
from writehead.core.bind import Of, itself
from writehead.core.positions import advance
from writehead.core.shapes import check_shape
from writehead.core.slots import Store
from writehead.core.state import Node, Once, State, apply, join, rewind, select, tensors
from writehead.mixer import Aux
from writehead.model.init import initialise
from writehead.model.parts import build_embedding, build_position, build_stack


@dataclass(frozen=True)
class DecodeState(Node):
    """What a decoder remembers of B rows.

    Attributes:
        pos: (B,) the position of each row's next token.
        layers: the stack's state: for each layer the mixer's and the memory that its cross-attention reads
            (or None), unless the stack says otherwise.
    """

    pos: Tensor
    layers: tuple[State, ...]

    def tensors(self) -> Iterator[Tensor]:
        yield self.pos
        yield from tensors(self.layers)

    def map(self, function: Callable[[Tensor], Tensor]) -> "DecodeState":
        return DecodeState(function(self.pos), apply(self.layers, function))

    def select(self, index: Tensor, once: Once) -> "DecodeState":
        return DecodeState(self.pos[index], select(self.layers, index, once))

    def join(self, other: Node, once: Once) -> "DecodeState":
        assert isinstance(other, DecodeState)
        return DecodeState(torch.cat([self.pos, other.pos]), join(self.layers, other.layers, once))

    def rewind(self, n: Tensor, once: Once) -> "DecodeState":
        return DecodeState(self.pos - n, rewind(self.layers, n, once))


class Decoder(nn.Module):
    """The model that a config of kind "decoder" describes (or the decoding half of a "seq2seq" one)."""

    def __init__(self, config: ModelConfig, table: nn.Parameter | None = None) -> None:
        """Make the model with fresh weights; `table` shares an encoder's embeddings.

        Raises:
            ValueError: a config whose parts do not fit together.
        """
        super().__init__()
        if config.kind == "encoder":
            raise ValueError("this config describes an encoder; build it with Encoder")
        self.config = config
        position = build_position(config)
        self.embedding = build_embedding(config, position, table)
        self.stack = build_stack(config, position)
        initialise(self, config.init, config.depth)

    def init_state(
        self,
        batch: int,
        store: Store = Store(),
        memories: tuple[State, ...] | None = None,
    ) -> DecodeState:
        """The empty past.

        Args:
            batch: rows B.
            store: how caches are kept.
            memories: what each layer's cross-attention reads.
        """
        like = self.embedding.table
        pos = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return DecodeState(pos, self.stack.init_state(batch, like, store, memories))  # type: ignore[operator]

    @property
    def blocks(self) -> Iterator[Any]:
        """The layers."""
        yield from self.stack.blocks  # type: ignore[misc]

    def bind(self, of: Of = itself) -> Callable[[Tensor, DecodeState], tuple[Tensor, DecodeState, Aux]]:
        """`hidden` as a plain function; with `bound` for engines, which look every weight up once."""
        embedding, stack = self.embedding, of(self.stack)

        def run(tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState, Aux]:
            check_shape("tokens", tokens, "B T", B=len(state.pos))
            pos, after = advance(tokens, state.pos)
            x, layers, aux = stack(embedding(tokens, pos), pos, state.layers)
            return x, DecodeState(after, layers), aux

        return run

    def hidden(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState, Aux]:
        """Take T new tokens into the state.

        Args:
            tokens: (B, T) ids, -1 = padding anywhere in a row.
            state: the past; consumed.

        Returns:
            The last layer's output (B, T, X) for `logits`, the state after the tokens, auxiliary values.

        Raises:
            ValueError: a shape, token or position that the model does not have.
        """
        return self.bind()(tokens, state)

    def logits(self, x: Tensor) -> Tensor:
        """The last layer's output (..., X) -> (..., V)."""
        logits: Tensor = self.embedding.logits(x)
        return logits

    def step(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """tokens (B, T), -1 = padding -> logits (B, T, V) and the state after them; `state` is consumed."""
        x, state, _ = self.hidden(tokens, state)
        return self.logits(x), state

    def whole(self, tokens: Tensor, memories: tuple[State, ...] | None = None) -> tuple[Tensor, Aux]:
        """`hidden` from the empty past for whoever wants no state after: training and scoring.

        Args:
            tokens: (B, T) ids, -1 = padding.
            memories: what each layer's cross-attention reads.
        """
        check_shape("tokens", tokens, "B T")
        pos, _ = advance(tokens, torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device))
        empty = (None,) * self.config.depth
        state = tuple(zip(empty, memories or empty, strict=True))
        y, aux = self.stack.whole(self.embedding(tokens, pos), pos, state)  # type: ignore[operator]
        return y, aux

    def forward(self, tokens: Tensor) -> tuple[Tensor, Aux]:
        """Training and scoring: tokens (B, T) -> logits (B, T, V) and auxiliary values, from the empty
        past."""
        x, aux = self.whole(tokens)
        return self.logits(x), aux
