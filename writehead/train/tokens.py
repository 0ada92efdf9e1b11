"""Text as numbers: tokenizers made here or elsewhere, and streams of tokens that are mapped from disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tokenizers as tk
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from writehead.catalog import Spec
from writehead.convert.strict_json import read_json
from writehead.convert.tokenizer import Tokenizer
from writehead.convert.writing import replacing, write_json
from writehead.core.shapes import check_choice
from writehead.train.corpus import Text

Tokens: TypeAlias = NDArray[Any]  # uint16 or uint32
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
LABEL = "<|label:{}|>"  # a class of texts is a token, whose row of the output matrix is its classifier
SMALLEST_BPE = 256 + len(SPECIAL)


def make_tokenizer(spec: Spec, corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer of a data section.

    Args:
        spec: {"name": "bytes"}, {"name": "bpe", "vocab": V} or {"name": "folder", "path": ...}.
        corpus: what "bpe" is trained on; the others do not read it.

    Raises:
        ValueError: an unknown tokenizer or argument, or a vocabulary below the bytes and special tokens.
    """
    accepted = {"bytes": (), "bpe": ("vocab",), "folder": ("path",)}
    name = str(spec.get("name"))
    check_choice("tokenizer", name, accepted)
    for key in spec:
        check_choice(f"argument of tokenizer {name!r}", str(key), ("name", *accepted[name]))
    for key in accepted[name]:
        if key not in spec:
            raise ValueError(f"tokenizer {name!r} needs {key}; got {dict(spec)}")
    if name == "bytes":
        return Tokenizer.bytes()
    return Tokenizer.from_directory(spec["path"]) if name == "folder" else train_bpe(spec["vocab"], corpus)


def train_bpe(vocab: int, corpus: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer whose merges are learned from texts.

    Raises:
        ValueError: fewer tokens than the bytes and special tokens, or texts with too few different pairs.
    """
    if isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < SMALLEST_BPE:
        raise ValueError(f"a BPE vocabulary of {vocab!r} must be at least {SMALLEST_BPE} (bytes and special)")
    core = tk.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(text, normalized=False) for text in SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    if core.get_vocab_size() < vocab:
        raise ValueError(
            f"the text gives only {core.get_vocab_size()} tokens, not vocab={vocab}; "
            f"nearest is {core.get_vocab_size()}"
        )
    return Tokenizer(core, special=SPECIAL)


def add_labels(tokenizer: Tokenizer, labels: Sequence[str]) -> Tokenizer:
    """The same tokenizer with a special token for each class."""
    core = tk.Tokenizer.from_str(tokenizer.core.to_str())
    core.add_special_tokens([AddedToken(LABEL.format(label), normalized=False) for label in labels])
    return Tokenizer(core, special=tokenizer.special, eos=tokenizer.eos, template=tokenizer.template)


def labels_of(tokenizer: Tokenizer) -> dict[str, int]:
    """The classes that a tokenizer knows, with their tokens, in the order of these."""
    first, last = LABEL.split("{}")
    return {
        token.content[len(first) : -len(last)]: number
        for number, token in sorted(tokenizer.core.get_added_tokens_decoder().items())
        if token.content.startswith(first) and token.content.endswith(last)
    }


class Encode:
    """Texts to tokens for training: special tokens written in a text are text, and nothing is added."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._core = tk.Tokenizer.from_str(tokenizer.core.to_str())
        self._core.encode_special_tokens = True
        self._core.no_truncation()
        plain = self._core.get_vocab_size(with_added_tokens=False) == 256
        self._bytes = plain and all(tokenizer.token_bytes(i) == bytes([i]) for i in range(256))
        self.dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        if self._bytes:
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        found = self._core.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in found]


@dataclass(frozen=True)
class Counts:
    """What a stream holds.

    Attributes:
        tokens, documents, bytes, words: how many; words are what white space separates.
        dtype: of the file's numbers.
        sha256: of the file.
    """

    tokens: int
    documents: int
    bytes: int
    words: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Stream:
    """Documents one after the other, each followed by the token that ends a text, mapped from a file."""

    tokens: Tokens
    counts: Counts


def write_stream(path: Path, tokenizer: Tokenizer, texts: Iterable[Text]) -> Stream:
    """Encode texts into a file (and PATH.json, which counts what is in it) and map it.

    Raises:
        ValueError: there is no text.
    """
    encode, digest = Encode(tokenizer), hashlib.sha256()
    tokens = documents = size = words = 0
    end = np.array(sorted(tokenizer.eos)[:1], encode.dtype)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for batch in _batches(texts):
            for text, ids in zip(batch, encode([t.text for t in batch]), strict=True):
                data = np.concatenate([ids, end]).tobytes() if text.ends else ids.tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(data) // encode.dtype().itemsize
                documents += text.ends
                size += len(text.text.encode())
                words += len(text.text.split())
    if not size:
        raise ValueError("the data holds no text")
    counts = Counts(tokens, documents, size, words, np.dtype(encode.dtype).name, digest.hexdigest())
    write_json(path.with_name(path.name + ".json"), asdict(counts))
    return Stream(np.memmap(path, encode.dtype, "r"), counts)


def read_stream(path: Path) -> Stream | None:
    """The stream that a file holds, or None if there is none.

    Raises:
        ValueError: the file is not the one that its PATH.json describes.
    """
    facts = path.with_name(path.name + ".json")
    if not path.exists() or not facts.exists():
        return None
    try:
        counts = Counts(**read_json(facts))
    except TypeError as error:
        raise ValueError(f"{facts}: does not describe a stream; delete it") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != counts.sha256:
        raise ValueError(f"{path}: is not the file that {facts.name} describes; delete both")
    return Stream(np.memmap(path, np.dtype(counts.dtype), "r"), counts)


def digest(*values: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    held: list[Text] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text.text)
        if size >= 1 << 22:
            yield held
            held, size = [], 0
    if held:
        yield held
