"""Our decoders in EleutherAI's lm-evaluation-harness: what its tasks ask of a model.

lm_eval.simple_evaluate(model=adapter(load("run")), tasks=["lambada_openai"])
"""

import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from writehead.convert.load import Loaded
from writehead.convert.tokenizer import Tokenizer
from writehead.decode.generate import generate
from writehead.evaluate.perplexity import score
from writehead.model.decoder import Decoder
from writehead.train.tokens import Encode

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


class Scorer:
    """Log-probabilities and continuations of texts, in the harness's conventions.

    A text without a past follows the token that begins a text, else the one that ends it. What does not fit
    the window is cut off at its beginning.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, window: int | None = None, batch: int = 8
    ) -> None:
        """Wrap a model.

        Args:
            model: in evaluation mode.
            tokenizer: of the model.
            window: tokens that a call reads; default what the model was made for, at most 1024.
            batch: rows computed together.

        Raises:
            ValueError: a window below 2, or a tokenizer without a token that begins or ends texts.
        """
        limit = model.embedding.position.max_context or 1024
        self.window = min(model.config.max_context or 1024, 1024, limit) if window is None else window
        if self.window < 2:
            raise ValueError(f"window={self.window} must be at least 2")
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch
        self.encode = Encode(tokenizer)
        first = [*([] if tokenizer.bos is None else [tokenizer.bos]), *sorted(tokenizer.eos)]
        if not first:
            raise ValueError("the tokenizer has no token that begins or ends a text")
        self.first = first[0]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, special tokens as text."""
        return [int(token) for token in self.encode([text])[0]] if text else []

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, encoded as one text; spaces at the context's end belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before, whole = self.ids(context), self.ids(context + continuation)
        return before or [self.first], whole[len(before) :]

    @torch.inference_mode()
    def continuations(self, given: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether greedy decoding says it."""
        rows = [self.split(*pair) for pair in given]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            read = [(rows[i][0] + rows[i][1])[-self.window - 1 :] for i in chosen]
            table = torch.full((len(read), max(map(len, read)) - 1), -1)
            for line, ids in zip(table, read, strict=True):
                line[: len(ids) - 1] = torch.tensor(ids[:-1])
            logits, _ = self.model(table.to(self.model.embedding.table.device))
            for row, ids, i in zip(logits, read, chosen, strict=True):
                count = min(len(rows[i][1]), len(ids) - 1)
                if count:
                    target = torch.tensor(ids[-count:], device=row.device)
                    scores = row[len(ids) - 1 - count : len(ids) - 1].float().log_softmax(-1)
                    said = scores.gather(-1, target[:, None]).sum()
                    found[i] = float(said), bool((scores.argmax(-1) == target).all())
        return found

    def whole(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, in windows apart."""
        found = []
        for text in texts:
            tokens = np.array([self.first, *self.ids(text)], self.encode.dtype)
            nats = score(self.model, tokens, self.window, self.window, self.batch) if len(tokens) > 1 else 0.0
            found.append(-nats)
        return found

    def continued(self, context: str, options: Mapping[str, Any]) -> str:
        """A continuation up to a stop string of `until`, greedy unless `do_sample` and a temperature.

        Raises:
            ValueError: an option that we do not have.
        """
        unknown = sorted(set(options) - set(GENERATION))
        if unknown:
            raise ValueError(f"unknown generation arguments {unknown} (accepted: {', '.join(GENERATION)})")
        until = options.get("until") or []
        sampled = options.get("do_sample", False)
        more = {name: options[name] for name in ("top_p", "top_k") if sampled and name in options}
        length = min(int(options.get("max_gen_toks", 256)), self.window - 1)
        ids = (self.ids(context) or [self.first])[-(self.window - length) :]
        (said,) = generate(
            self.model,
            [ids],
            tokenizer=self.tokenizer,
            max_new_tokens=length,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            stop_strings=[s for s in ([until] if isinstance(until, str) else until) if s],
            **more,
        )
        return said.text or ""


def adapter(loaded: Loaded, *, window: int | None = None, batch: int = 8) -> Any:
    """The model as `lm_eval` wants it.

    Args:
        loaded: a decoder with its tokenizer.
        window, batch: see `Scorer`.

    Raises:
        ValueError: the package is not installed, or the model does not continue texts.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("the harness needs the package lm-eval: pip install writehead[harness]")
    if not isinstance(loaded.model, Decoder) or loaded.tokenizer is None:
        raise ValueError(f"{loaded.source} is no decoder with a tokenizer, so it continues no text")
    scorer = Scorer(loaded.model, loaded.tokenizer, window=window, batch=batch)
    base: Any = importlib.import_module("lm_eval.api.model").LM

    class Adapter(base):  # type: ignore[misc]
        """Requests of the harness, answered by a `Scorer`."""

        def loglikelihood(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
            return scorer.continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[float]:
            return scorer.whole([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[str]:
            return [scorer.continued(*request.args) for request in requests]

    return Adapter()
