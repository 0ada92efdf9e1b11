"""How often a classifier is right."""

import math
from dataclasses import dataclass

import torch

from writehead.convert.tokenizer import Tokenizer
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.train.batches import Samples
from writehead.train.config import LossConfig
from writehead.train.corpus import pairs
from writehead.train.data import FIELDS, labelled_samples
from writehead.train.objective import Objective
from writehead.train.tokens import labels_of

Z = 1.96  # two-sided 95 %


@dataclass(frozen=True)
class Accuracy:
    """The score of a classifier.

    Attributes:
        right, count: texts.
        nll: mean negative log-likelihood of the right class, in nats.
        notes: what was cut.
    """

    right: int
    count: int
    nll: float
    notes: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of the texts."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        p, n = self.accuracy, self.count
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@torch.inference_mode()
def accuracy(
    model: Encoder | Decoder,
    tokenizer: Tokenizer,
    sources: tuple[str, ...],
    *,
    length: int | None = None,
    batch: int = 16,
    fields: tuple[str, str] | None = None,
) -> Accuracy:
    """Classify texts with the classes that the tokenizer holds.

    Args:
        model: in evaluation mode.
        tokenizer: with the labels of training.
        sources: as data.train of a run of labelled texts.
        length: tokens of a text at most; default what the model was made for, or all.
        batch: texts computed together.
        fields: keys of JSONL lines: label and text.

    Raises:
        ValueError: a model without classes, or a label that it does not know.
    """
    choices = labels_of(tokenizer)
    if not choices:
        raise ValueError("the model's tokenizer holds no labels; it was not trained on labelled texts")
    given = list(pairs(sources, fields or FIELDS["labelled"]))  # type: ignore[arg-type]
    samples, notes = labelled_samples(given, tokenizer, length or model.config.max_context or 1 << 20)
    batches = Samples(samples, batch, None, None)
    objective = Objective(model, LossConfig(), list(choices.values())).eval()
    right, nll = 0, 0.0
    for index in range(batches.count):
        sums, _ = objective(batches(index).to(model.embedding.table.device))
        right, nll = right + int(sums.right), nll + float(sums.nll)
    return Accuracy(right, len(samples), nll / len(samples), tuple(notes))
