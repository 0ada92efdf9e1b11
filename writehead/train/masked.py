"""Texts with words left out, and with whole sentences hidden that their summaries must tell apart.

The masking of a row is a function of seed, step and row. Words are masked whole: 8 of 10 become the mask
token, 1 of 10 random tokens, 1 of 10 stays. Of a hidden sentence only the summary token is left; nothing of
it is guessed word by word.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken
from tokenizers import Tokenizer as Core
from torch import Tensor
from torch.nn import functional as F

from writehead.convert.tokenizer import Tokenizer
from writehead.train.batches import Batch, Windows
from writehead.train.config import MaskConfig
from writehead.train.order import Ints, mix, uniform

MASK, SUMMARY = "<|mask|>", "<|summary|>"
MASKED, RANDOM = 0.8, 0.1  # of the words to guess; the others stay
Flags = NDArray[np.bool_]


def add_masks(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with the mask and the summary token."""
    core = Core.from_str(tokenizer.core.to_str())
    core.add_special_tokens([AddedToken(text, normalized=False) for text in (MASK, SUMMARY)])
    return Tokenizer(core, special=tokenizer.special, eos=tokenizer.eos, template=tokenizer.template)


class Marks:
    """What a tokenizer's tokens say of words and sentences, each (V,).

    Attributes:
        begins: a word begins with it, unless it follows a blank.
        blank: it is white space.
        stops: a sentence ends with it if a word begins after it.
        ends: a sentence ends with it: a line, a text.
        ordinary: ids of tokens that stand for text.
        mask, summary: ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        core, special = tokenizer.core, tokenizer.core.get_added_tokens_decoder()
        spelled = [b"" if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab)]
        named = np.array([i in special for i in range(tokenizer.vocab)])
        self.begins: Flags = named | np.array([one[:1].isspace() for one in spelled])
        self.blank: Flags = np.array([one.isspace() for one in spelled])
        self.stops: Flags = np.array([one[-1:] in (b".", b"!", b"?") for one in spelled])
        self.ends: Flags = named | np.array([one[-1:] == b"\n" for one in spelled])
        self.ordinary: Ints = np.flatnonzero(~named)
        numbers = core.get_vocab()
        self.mask, self.summary = numbers[MASK], numbers[SUMMARY]

    def words(self, row: Ints, sentence: Ints) -> Ints:
        """(L,) the number of each token's word, the white space before it included."""
        after = self.begins[row[1:]] & ~self.blank[row[:-1]]
        return np.append(0, np.cumsum(after | (sentence[1:] > sentence[:-1])))

    def sentences(self, row: Ints, longest: int) -> Ints:
        """(L,) the number of each token's sentence; longer ones are cut into pieces of `longest`."""
        after = np.append(row[1:], row[-1])
        ends = (self.stops[row] & self.begins[after]) | (self.ends[row] & ~self.ends[after])
        starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
        within = np.arange(len(row)) - np.repeat(starts, np.diff(np.append(starts, len(row))))
        return np.cumsum(within % longest == 0) - 1


class Row(NamedTuple):
    """One row: what is read and guessed (L,), the sentence of each token (L,), and which are hidden."""

    read: Ints
    target: Ints
    sentence: Ints
    hidden: Ints


class Masked:
    """Windows of a stream with words masked, the summaries of their sentences before them."""

    def __init__(self, windows: Windows, marks: Marks, config: MaskConfig, seed: int) -> None:
        self.windows, self.marks, self.config, self.seed = windows, marks, config, seed
        self.count = windows.count

    def __call__(self, step: int) -> Batch:
        rows = self.windows(step).tokens.numpy()
        made = [self._row(row, mix(self.seed, 6, step, i)) for i, row in enumerate(rows)]
        tokens = torch.from_numpy(np.stack([one.read for one in made]))
        target = torch.from_numpy(np.stack([one.target for one in made]))
        g = self.config.summaries
        if not g:
            return Batch(tokens, target)
        sentence = torch.from_numpy(np.stack([one.sentence for one in made]))
        there = torch.arange(g) <= sentence.max(1, keepdim=True).values
        none = torch.full(there.shape, -1)
        alone, asked = self._hidden(rows, made)
        return Batch(
            torch.cat([torch.where(there, self.marks.summary, -1), tokens], 1),
            torch.cat([none, target], 1),
            owners=torch.cat([none, torch.where(sentence < g, sentence, -1)], 1),
            alone=alone,
            asked=asked,
        )

    def _row(self, row: Ints, key: int) -> Row:
        sentence = self.marks.sentences(row, self.config.sentence)
        count = min(int(sentence[-1]) + 1, self.config.summaries)
        kept = int(sentence[-1]) == 0  # the only sentence is not hidden, or nothing would be left
        hide = 0 if kept or not self.config.sentences else max(1, round(self.config.sentences * count))
        hidden = np.sort(_drawn(count, min(hide, int(sentence[-1])), mix(key, 0)))
        secret = np.isin(sentence, hidden)
        words = self.marks.words(row, sentence)
        names = np.unique(words[~secret])
        guessed = names[_drawn(len(names), max(1, round(self.config.words * len(names))), mix(key, 1))]
        fate = uniform(mix(key, 2), int(words[-1]) + 1)[words]
        chosen = np.isin(words, guessed) & ~secret
        noise = self.marks.ordinary[(uniform(mix(key, 3), len(row)) * len(self.marks.ordinary)).astype(int)]
        read = np.where(secret | (chosen & (fate < MASKED)), self.marks.mask, row)
        read = np.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), noise, read)
        return Row(read, np.where(chosen, row, -1), sentence, hidden)

    def _hidden(self, rows: Ints, made: list[Row]) -> tuple[Tensor, Tensor]:
        """The hidden sentences, each alone behind its summary, and where their summaries are."""
        most, g = max(len(one.hidden) for one in made), self.config.summaries
        longest = max([int((one.sentence == n).sum()) for one in made for n in one.hidden], default=0)
        alone = np.full((len(rows), most, g + longest), -1)
        asked = np.full((len(rows), most), -1)
        for b, (row, one) in enumerate(zip(rows, made, strict=True)):
            asked[b, : len(one.hidden)] = one.hidden
            alone[b, : len(one.hidden), 0] = self.marks.summary
            for i, n in enumerate(one.hidden):
                inside = row[one.sentence == n]
                alone[b, i, g : g + len(inside)] = inside
        return torch.from_numpy(alone), torch.from_numpy(asked)


def contrast(summaries: Tensor, alone: Tensor) -> Tensor:
    """How badly the summaries of hidden sentences name their own among all (contrastive predictive coding).

    Args:
        summaries: (N, X) what a row says of each sentence that was hidden in it.
        alone: (N, X) what each of these sentences says alone.

    Returns:
        The mean cross-entropy in nats of choosing by dot product / sqrt(X); 0 of one sentence or none.
    """
    if not len(summaries):
        return summaries.sum()
    scores = (summaries @ alone.T).float() * summaries.shape[-1] ** -0.5
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def _drawn(count: int, wanted: int, key: int) -> Ints:
    """So many of the numbers below `count`."""
    return np.argsort(uniform(key, count), kind="stable")[:wanted]
