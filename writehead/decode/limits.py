"""What an engine can take: checks of prompts, positions and memory that need no computation, nor PyTorch."""

import warnings
from collections.abc import Sequence
from typing import Protocol

from writehead.core.system import available_memory
from writehead.decode.options import Options
from writehead.decode.result import Tokenizer


class Limits(Protocol):
    """What every engine says of its model.

    Attributes:
        vocab: tokens that there are.
        positions: how many positions exist; None = any number.
        trained_context: tokens the model was made for; None = unknown.
    """

    vocab: int
    positions: int | None
    trained_context: int | None


def check_prompts(
    limits: Limits, prompts: Sequence[Sequence[int]], options: Options, tokenizer: Tokenizer | None
) -> list[list[int]]:
    """The prompts as lists, an empty one replaced by the token that begins a text.

    Raises:
        ValueError: nothing to start from, or tokens that do not exist.
    """
    if not len(prompts):
        raise ValueError("no prompts: give at least one list of token ids")
    if options.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, since a string may end in the middle of a token")
    given = [_checked(n, prompt, limits, tokenizer) for n, prompt in enumerate(prompts)]
    for token in options.eos:
        if token >= limits.vocab:
            raise ValueError(f"eos_token_id {token} is not in the vocabulary of {limits.vocab}")
    return given


def check_context(limits: Limits, prompt: int, new: int) -> None:
    """Raise unless positions suffice for so many new tokens behind a prompt.

    Raises:
        ValueError: naming what can be had.
    """
    # The last new token is never fed back, so it takes no position.
    needed = prompt + new - 1
    if limits.positions is not None and needed > limits.positions:
        room = limits.positions + 1 - prompt
        fix = f"max_new_tokens can be at most {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} need {needed} positions, and this model "
            f"has {limits.positions}: {fix}"
        )


def warn_of_length(limits: Limits, prompt: int, new: int) -> None:
    """Warn if a text will become longer than those that the model was made for."""
    if limits.trained_context is not None and prompt + new - 1 > limits.trained_context:
        warnings.warn(
            f"a prompt of {prompt} tokens and max_new_tokens={new} go beyond the {limits.trained_context} "
            "tokens that this model was made for; the text may become poor",
            stacklevel=5,
        )


def check_room(caches: int, rows: int, context: int, width: int) -> None:
    """Raise unless there is memory for caches and logits.

    Args:
        caches: bytes.
        rows: that are decoded.
        context: tokens of each, for the message.
        width: logits of a row.

    Raises:
        ValueError: saying how much is needed and how much is there.
    """
    logits = 4 * 4 * rows * width  # the logits and what choosing makes of them, float32
    check_memory(caches + logits, f"decoding {rows} row{'s' * (rows > 1)} of {context} tokens")


def check_memory(needed: int, what: str) -> None:
    """Raise if `needed` bytes are more than this machine can still give.

    Raises:
        ValueError: saying how much is needed and how much is there.
    """
    there = available_memory()
    if there is not None and needed > there:
        raise ValueError(
            f"{what} needs {needed / 2**30:.2f} GiB, and {there / 2**30:.2f} GiB are available: "
            "shorten the prompt or max_new_tokens, take fewer rows or beams, or store caches in int8"
        )


def _checked(n: int, prompt: Sequence[int], limits: Limits, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str | bytes | int):
        raise ValueError(f"prompt {n} must be a list of token ids; got {type(prompt).__name__}")
    tokens = [int(token) for token in prompt]
    for token in tokens:
        if not 0 <= token < limits.vocab:
            raise ValueError(f"prompt {n}: token {token} is not in the vocabulary (0 to {limits.vocab - 1})")
    if tokens:
        return tokens
    start = None if tokenizer is None else tokenizer.bos
    if start is None:
        raise ValueError(f"prompt {n} is empty, and there is no beginning-of-sequence token to start from")
    return [start]
