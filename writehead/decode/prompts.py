"""Prompts on their way into an engine: every check that needs no computation, then one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from writehead.core.slots import Store
from writehead.decode.engine import Engine
from writehead.decode.limits import check_context, check_prompts, check_room, warn_of_length
from writehead.decode.options import Options
from writehead.decode.result import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """A batch that may start.

    Attributes:
        given: what the caller gave, an empty prompt replaced.
        tokens: (R, T) what the decoder starts from, -1 = padding at the end.
        source: (R, S) what the encoder reads, if there is one.
        store: how caches are kept, with room for everything.
    """

    given: list[list[int]]
    tokens: Tensor
    source: Tensor | None
    store: Store

    @property
    def count(self) -> int:
        """Prompt tokens that prefill computes."""
        return sum(map(len, self.given)) + (0 if self.source is None else len(self.given))

    @property
    def mean_length(self) -> float:
        """Tokens that a row of the decoder starts from, on average."""
        return float((self.tokens >= 0).sum()) / len(self.tokens)


def prepare(
    engine: Engine, prompts: Sequence[Sequence[int]], options: Options, tokenizer: Tokenizer | None
) -> Prompts:
    """Check prompts and options against the engine and lay the prompts out.

    Raises:
        ValueError: nothing to start from, tokens or positions that do not exist, or caches beyond the memory.
    """
    given = check_prompts(engine, prompts, options, tokenizer)
    first = _decoder_start(engine, options)
    longest = max(map(len, given))
    tokens, source = _padded(given), None
    if engine.reads_source:
        if engine.source_positions is not None and longest > engine.source_positions:
            raise ValueError(
                f"a source of {longest} tokens is longer than the encoder's "
                f"{engine.source_positions} positions"
            )
        tokens, source = torch.full((len(given), 1), first), tokens
    check_context(engine, tokens.shape[1], options.max_new_tokens)
    context = tokens.shape[1] + options.max_new_tokens
    store = replace(options.store, capacity=context)
    _check_size(engine, len(given), store, options, 0 if source is None else source.shape[1])
    warn_of_length(engine, tokens.shape[1], options.max_new_tokens)
    return Prompts(given, tokens, source, store)


def _decoder_start(engine: Engine, options: Options) -> int:
    first = options.decoder_start_token_id
    if not engine.reads_source:
        if first is not None:
            raise ValueError(f"decoder_start_token_id={first} was given, but this model has no encoder")
        return -1
    if first is None or not 0 <= first < engine.vocab:
        raise ValueError(
            f"decoder_start_token_id={first}: an encoder-decoder model needs the token that its decoder "
            f"starts from (0 to {engine.vocab - 1}), often the padding token"
        )
    return first


def _check_size(engine: Engine, prompts: int, store: Store, options: Options, source: int) -> None:
    rows = prompts * max(options.num_beams, options.num_return_sequences)
    # Dropping, repeating and reordering rows makes a copy while the original lives.
    copies = 1 if rows == 1 else 2
    caches = copies * engine.state_bytes(rows, store.capacity, store) + engine.memory_bytes(prompts, source)
    width = (1 + options.prompt_lookup_num_tokens) * engine.vocab
    check_room(caches, rows, store.capacity, width)


def _padded(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
