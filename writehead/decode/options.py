"""What a caller may ask of `generate`: one value, checked when it is made, with Hugging Face's names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from writehead.core.shapes import check_choice

if TYPE_CHECKING:
    from writehead.core.slots import Store
    from writehead.decode.result import Tokenizer

BEAM_RULES = ("power", "gnmt")
SMALLEST_TEMPERATURE = 1e-6  # below this, logits divided by the temperature leave the range of float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token; the default is greedy.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k largest logits, and whatever equals the k-th; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as probable as the most probable one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 is none.
        seed: any integer from 0; None takes a fresh one from the operating system.

    Raises:
        ValueError: a value outside its range, or a filter that greedy decoding would ignore.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more; nearest is 0")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} is too small to sample with: give 0 (greedy) or at least "
                f"{SMALLEST_TEMPERATURE}"
            )
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r} must be a whole number of tokens, 0 (off) or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _check_real(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1; nearest is {float(value > 1)}")
        _check_real("repetition_penalty", self.repetition_penalty)
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0; 1.0 turns it off"
            )
        if self.seed is not None and (not _is_integer(self.seed) or self.seed < 0):
            raise ValueError(f"seed={self.seed!r} must be a whole number, 0 or more, or None")
        self._refuse_filters_of_greedy()

    def _refuse_filters_of_greedy(self) -> None:
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if self.temperature == 0 and getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0 (greedy): give a "
                    f"temperature above 0, such as 1.0, or leave {name} at {off}"
                )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_real(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue prompts. Greedy unless a temperature above 0 is given, which is what samples.

    Attributes:
        max_new_tokens: tokens to add at most, the one that ends a text included.
        min_new_tokens: an end-of-sequence token is not chosen before so many tokens.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.
        num_return_sequences: continuations of each prompt: samples, or the best beams.
        num_beams: beams of a search; 1 is none.
        length_penalty: a beam's log-probability is divided by the length's penalty to this power.
        beam_rule: "power", the search of transformers: the penalty is length ** length_penalty, a text that
            ends counts if it is among the num_beams best so far, and texts that the limit cuts off compete.
            "gnmt", that of Tensor2Tensor and Mesh TensorFlow: the penalty is ((5 + length) / 6) **
            length_penalty, any text that ends counts, and texts that the limit cuts off come after those.
        early_stopping: what ends a search once num_beams texts ended: True, just that; False, the best beam
            would not win by ending now; "never" (safe, the default), no beam can win at any length.
        eos_token_id: the tokens that end a text: one or several; None = those of the tokenizer, () = none.
        stop_strings: strings that end a text and are not part of it; needs a tokenizer.
        decoder_start_token_id: encoder-decoder models only: the token that the decoder starts from.
        prompt_lookup_num_tokens: draft up to so many tokens from the text itself and verify them in one call;
            the tokens are those of plain decoding. 0 is off.
        cache_dtype: how caches store what they hold (see `Store`).

    Raises:
        ValueError: a value outside its range, or two that do not go together.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    beam_rule: str = "power"
    early_stopping: bool | str = "never"
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    decoder_start_token_id: int | None = None
    prompt_lookup_num_tokens: int = 0
    cache_dtype: Any = None

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")
        check_choice("beam_rule", self.beam_rule, BEAM_RULES)
        if isinstance(self.stop_strings, str):
            raise ValueError(f"stop_strings={self.stop_strings!r} must be a list of strings")
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings: {stop!r} is not a string of at least one character")
        _ = self.sampling, self.eos, self.cache_dtype is None or self.store  # they check their values
        self._check_beams()
        if self.num_beams == 1 and self.num_return_sequences > 1 and self.temperature == 0:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} greedy continuations would be equal: give "
                "a temperature above 0, or num_beams"
            )

    @classmethod
    def of(cls, options: "Options | None", values: Mapping[str, Any]) -> "Options":
        """`options`, or the defaults, with single values replaced.

        Raises:
            ValueError: an unknown name, or what the constructor refuses.
        """
        for key in values:
            if key == "do_sample":
                raise ValueError("do_sample is implied: a temperature above 0 samples, 0 is greedy")
            check_choice("option", key, [f.name for f in fields(cls)])
        return replace(options or cls(), **values)

    def ending_at(self, tokenizer: "Tokenizer | None") -> "Options":
        """With the tokenizer's tokens that end a text, unless these options name some."""
        if self.eos_token_id is not None or tokenizer is None:
            return self
        return replace(self, eos_token_id=tuple(tokenizer.eos))

    @property
    def sampling(self) -> Sampling:
        """How to choose a token."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    @property
    def store(self) -> "Store":
        """How caches are kept, before the capacity is known."""
        from writehead.core.slots import Store  # with PyTorch, which `solo` decodes without

        return Store(slack=self.prompt_lookup_num_tokens, dtype=self.cache_dtype)

    @property
    def eos(self) -> frozenset[int]:
        """The tokens that end a text."""
        given = self.eos_token_id
        eos = frozenset([given] if isinstance(given, int) else given or ())
        for token in eos:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(f"eos_token_id={given!r} must hold token ids, whole numbers from 0")
        return eos

    def _check_beams(self) -> None:
        if self.num_beams == 1:
            for name, off in _BEAM_ONLY.items():
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect without beams: give num_beams"
                    )
            return
        for name, off in _NOT_WITH_BEAMS.items():
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with num_beams={self.num_beams}: "
                    "beam search takes the most probable continuations as the model gives them"
                )
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}"
            )


_WHOLE = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "prompt_lookup_num_tokens": 0,
}
_BEAM_ONLY = {"length_penalty": 1.0, "beam_rule": "power", "early_stopping": "never"}
_NOT_WITH_BEAMS = {
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "prompt_lookup_num_tokens": 0,
    "stop_strings": (),
}
