"""The data of a run: read, encoded, split and laid out in batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from writehead.catalog import Spec
from writehead.convert.tokenizer import Tokenizer
from writehead.core.shapes import check_choice
from writehead.model.pixels import frame_of
from writehead.train.batches import Batches, Lanes, Sample, Samples, Windows
from writehead.train.config import DataConfig, MaskConfig
from writehead.train.corpus import pairs, texts
from writehead.train.images import Images, hash_of, read_images, split, tokens_of
from writehead.train.masked import Marks, Masked, add_masks
from writehead.train.order import mix, shuffled
from writehead.train.tokens import (
    Encode,
    Stream,
    add_labels,
    digest,
    labels_of,
    make_tokenizer,
    read_stream,
    write_stream,
)

NO_MASKS = MaskConfig()
FIELDS = {
    "text": ("text",),
    "masked": ("text",),
    "labelled": ("label", "text"),
    "parallel": ("source", "target"),
}


@dataclass(frozen=True)
class Data:
    """Everything that a run learns from.

    Attributes:
        tokenizer: of all texts; None of images.
        train, valid: batches.
        digest: a hash of tokens and order; a run that resumes must have the same.
        choices: tokens of the classes, for labelled texts.
        notes: what was cut or left out, for people.
        vocab: tokens of images.
    """

    tokenizer: Tokenizer | None
    train: Batches
    valid: Batches
    digest: str
    choices: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    vocab: int = 0

    @property
    def least_vocab(self) -> int:
        """Tokens that a model must have."""
        return self.vocab if self.tokenizer is None else self.tokenizer.vocab


def prepare(
    config: DataConfig, folder: Path, seed: int, carry: bool = False, masks: MaskConfig = NO_MASKS
) -> Data:
    """Read, encode and split the data of a run; token streams and a trained tokenizer are kept in `folder`.

    Args:
        config: the run's data section.
        folder: an existing folder, whose files are used again if the data section is the same.
        seed: of the order.
        carry: rows are consecutive segments.
        masks: what is left out of texts.

    Raises:
        ValueError: data that is missing, malformed, or too short for one batch.
    """
    if config.kind == "text":
        return _text(config, folder, seed, carry)
    if config.kind == "masked":
        return _masked(config, folder, seed, masks)
    return _samples(config, folder, seed)


def prepare_images(config: DataConfig, pixels: Spec, seed: int) -> Data:
    """Read, split and quantise the images of a run.

    Args:
        config: the run's data section.
        pixels: the model's, which says what its images are.
        seed: of the order.

    Raises:
        ValueError: images that are missing, malformed, or of another size.
    """
    frame = frame_of(pixels)
    images = read_images(config.train, frame)
    train, held = (
        (images, read_images(config.valid, frame)) if config.valid else split(images, config.holdout, seed)
    )
    tokens, other = tokens_of(train, frame), tokens_of(held, frame)
    return Data(
        None,
        Images(tokens, frame, config.batch, seed),
        Images(other, frame, config.batch, None),
        digest(hash_of(tokens), hash_of(other), config.batch, seed),
        vocab=frame.levels + 1,
    )


def _text(config: DataConfig, folder: Path, seed: int, carry: bool) -> Data:
    field = (config.fields or FIELDS["text"])[0]
    tokenizer = _tokenizer(config, folder, lambda: (t.text for t in texts(config.train, field)))
    stream = _stream(folder / "train.tokens", config.train, field, tokenizer)
    tokens, held = stream.tokens, stream.tokens[:0]
    digests = [stream.counts.sha256]
    if config.valid:
        other = _stream(folder / "valid.tokens", config.valid, field, tokenizer)
        held, digests = other.tokens, [*digests, other.counts.sha256]
    else:
        cut = len(tokens) - max(1, round(len(tokens) * config.holdout))
        tokens, held = tokens[:cut], tokens[cut:]
    lane = len(tokens) - 1 if not carry else (len(tokens) - 1) // config.batch
    for name, there in (("training", lane), ("validation", len(held) - 1)):
        if there < config.length:
            rows = f" in each of {config.batch} rows" if carry and name == "training" else ""
            raise ValueError(
                f"the {name} text has {max(there, 0)} tokens{rows}, data.length={config.length} needs more; "
                f"nearest is {max(there, 1)}"
            )
    train = Lanes(tokens, config.length, config.batch) if carry else None
    return Data(
        tokenizer,
        train or Windows(tokens, config.length, config.batch, seed),
        Windows(held, config.length, config.batch, None),
        digest(digests, config.holdout, config.length, config.batch, seed, carry),
    )


def _masked(config: DataConfig, folder: Path, seed: int, masks: MaskConfig) -> Data:
    """The windows of `_text` with words left out."""
    plain = _text(config, folder, seed, False)
    assert plain.tokenizer is not None
    tokenizer = add_masks(plain.tokenizer)
    marks, train, valid = Marks(tokenizer), plain.train, plain.valid
    assert isinstance(train, Windows)
    assert isinstance(valid, Windows)
    return Data(
        tokenizer,
        Masked(train, marks, masks, mix(seed, 7)),
        Masked(valid, marks, masks, mix(seed, 8)),
        digest(plain.digest, asdict(masks)),
    )


def _stream(path: Path, sources: Sequence[str], field: str, tokenizer: Tokenizer) -> Stream:
    return read_stream(path) or write_stream(path, tokenizer, texts(sources, field))


def _tokenizer(config: DataConfig, folder: Path, corpus: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer in `folder`, or a new one, which is kept there."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_directory(folder)
    made = make_tokenizer(config.tokenizer, corpus() if config.tokenizer.get("name") == "bpe" else ())
    made.save(folder)
    return made


def _samples(config: DataConfig, folder: Path, seed: int) -> Data:
    a, b = config.fields or FIELDS[config.kind]
    given = list(pairs(config.train, (a, b)))
    labelled = config.kind == "labelled"
    tokenizer = _tokenizer(config, folder, lambda: (t for pair in given for t in pair[labelled:]))
    if labelled and not labels_of(tokenizer):
        labels = sorted({label for label, _ in given})
        if len(labels) < 2:
            raise ValueError(f"the data has one label only, {labels[0]!r}; a classifier needs two")
        tokenizer = add_labels(tokenizer, labels)
        tokenizer.save(folder)
    if config.valid:
        train, valid = given, list(pairs(config.valid, (a, b)))
    else:
        count = max(1, round(len(given) * config.holdout))
        mixed = shuffled(np.arange(len(given)), len(given), mix(seed, 5))  # lines may be sorted by label
        train, valid = ([given[i] for i in np.sort(part)] for part in (mixed[count:], mixed[:count]))
    if not train:
        raise ValueError(f"{len(given)} lines of data are too few to hold {config.holdout:.0%} out")
    make = labelled_samples if labelled else parallel_samples
    (rows, notes), (held, more) = (make(part, tokenizer, config.length) for part in (train, valid))
    start = None if labelled else start_token(tokenizer)
    kept = [[int(t) for t in np.atleast_1d(v)] for row in (*rows, *held) for v in row]
    return Data(
        tokenizer,
        Samples(rows, config.batch, seed, start),
        Samples(held, config.batch, None, start),
        digest(kept, len(held), config.batch, seed),
        tuple(labels_of(tokenizer).values()),
        tuple(dict.fromkeys([*notes, *more])),
    )


def labelled_samples(
    given: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int
) -> tuple[list[Sample], list[str]]:
    """Label and text of each line as samples, and what was cut.

    Raises:
        ValueError: a label that the training data does not have.
    """
    names = list(labels_of(tokenizer))
    for label, _ in given:
        check_choice("label", label, names)
    ids = Encode(tokenizer)([text for _, text in given])
    long = sum(len(one) > length for one in ids)
    notes = [f"{long} of {len(ids)} texts are longer than {length} tokens and were cut"] if long else []
    pieces = [Sample(one[:length], names.index(label)) for one, (label, _) in zip(ids, given, strict=True)]
    return pieces, notes


def parallel_samples(
    given: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int
) -> tuple[list[Sample], list[str]]:
    """Source and target of each line as samples, both with their end, and what was left out.

    Raises:
        ValueError: no pair is short enough.
    """
    encode = Encode(tokenizer)
    end = np.array(sorted(tokenizer.eos)[:1], encode.dtype)
    sides = (encode([pair[side] for pair in given]) for side in (0, 1))
    every = [Sample(np.concatenate([s, end]), np.concatenate([t, end])) for s, t in zip(*sides, strict=True)]
    fits = [s for s in every if max(len(s.tokens), len(s.target)) <= length]  # type: ignore[arg-type]
    if not fits:
        raise ValueError(f"no pair has at most data.length={length} tokens on each side")
    out = len(every) - len(fits)
    return fits, [f"{out} of {len(every)} pairs are longer than {length} tokens and left out"] if out else []


def start_token(tokenizer: Tokenizer) -> int:
    """The token that a translation's decoder starts from: padding, as `generate` has it.

    Raises:
        ValueError: the tokenizer has no padding token, or none that ends a text.
    """
    if tokenizer.pad is None or not tokenizer.eos:
        raise ValueError("parallel text needs a tokenizer with pad_token and eos_token")
    return tokenizer.pad
