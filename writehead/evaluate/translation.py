"""How well a sequence-to-sequence model translates: BLEU by sacreBLEU, and perplexity of the references."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from writehead.convert.tokenizer import Tokenizer
from writehead.decode.generate import generate
from writehead.model.seq2seq import Seq2Seq
from writehead.train.batches import Samples
from writehead.train.config import LossConfig
from writehead.train.corpus import pairs
from writehead.train.data import FIELDS, parallel_samples, start_token
from writehead.train.objective import Objective
from writehead.train.tokens import Encode


@dataclass(frozen=True)
class Translation:
    """The score of a translation model.

    Attributes:
        bleu: 0 to 100.
        signature: sacreBLEU's, which says how it was computed.
        nll: mean nats of a token of the references, their ends among them.
        sentences: how many.
        texts: the translations, in the order of the sources.
    """

    bleu: float
    signature: str
    nll: float
    sentences: int
    texts: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """Of a token of the references."""
        return math.exp(self.nll)


def translation(
    model: Seq2Seq,
    tokenizer: Tokenizer,
    sources: tuple[str, ...],
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    beam_rule: str = "power",
    lowercase: bool = False,
    batch: int = 32,
    fields: tuple[str, str] | None = None,
    most: int | None = None,
) -> Translation:
    """Translate sources and compare with their references.

    Args:
        model: in evaluation mode.
        tokenizer: of both languages.
        sources: as data.train of a run of parallel text.
        num_beams, length_penalty, beam_rule: of the search, as `generate` takes them; 1 beam is greedy.
        lowercase: compare without case.
        batch: sentences translated together.
        fields: keys of JSONL lines: source and target.
        most: the first sentences only, so many.

    Raises:
        ValueError: sacreBLEU is not installed, or the data is malformed.
    """
    if find_spec("sacrebleu") is None:
        raise ValueError("BLEU needs the package sacrebleu: pip install sacrebleu")
    bleu: Any = importlib.import_module("sacrebleu.metrics").BLEU(lowercase=lowercase)
    given = list(pairs(sources, fields or FIELDS["parallel"]))[:most]  # type: ignore[arg-type]
    said = translate(model, tokenizer, [a for a, _ in given], num_beams, length_penalty, batch, beam_rule)
    found = bleu.corpus_score(said, [[b for _, b in given]])
    nll = reference_nats(model, tokenizer, given, batch)
    return Translation(found.score, str(bleu.get_signature()), nll, len(given), tuple(said))


def translate(
    model: Seq2Seq,
    tokenizer: Tokenizer,
    given: Sequence[str],
    num_beams: int = 4,
    length_penalty: float = 1.0,
    batch: int = 32,
    beam_rule: str = "power",
) -> list[str]:
    """The model's translation of each source; sources of about one length are translated together.

    A translation has at most twice the tokens of the longest source, and 10: one limit for all, so that
    a translation does not depend on what else is in its batch.
    """
    end = sorted(tokenizer.eos)[:1]
    ids = [[*map(int, one), *end] for one in Encode(tokenizer)(given)]
    limit = 2 * max(map(len, ids)) + 10
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    said = [""] * len(ids)
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        result = generate(
            model,
            [ids[i] for i in rows],
            tokenizer=tokenizer,
            num_beams=num_beams,
            length_penalty=length_penalty if num_beams > 1 else 1.0,
            beam_rule=beam_rule if num_beams > 1 else "power",
            max_new_tokens=limit,
            decoder_start_token_id=start_token(tokenizer),
        )
        for i, one in zip(rows, result, strict=True):
            said[i] = one.text or ""
    return said


@torch.inference_mode()
def reference_nats(
    model: Seq2Seq, tokenizer: Tokenizer, given: Sequence[tuple[str, str]], batch: int = 32
) -> float:
    """Mean nats of a token of the references."""
    samples, _ = parallel_samples(given, tokenizer, 1 << 20)
    batches = Samples(samples, batch, None, start_token(tokenizer))
    objective = Objective(model, LossConfig()).eval()
    nll, targets = 0.0, 0
    for index in range(batches.count):
        one = batches(index).to(model.encoder.embedding.table.device)
        sums, _ = objective(one)
        nll, targets = nll + float(sums.nll), targets + one.scored
    return nll / targets
