"""A `tokenizers` tokenizer from the vocabulary, merges and scores that a GGUF file carries."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers as tk
from tokenizers import decoders, models, normalizers, pre_tokenizers

from writehead.convert.errors import BadFile, shown
from writehead.convert.spelling import SPACE_MARK

if TYPE_CHECKING:
    from writehead.convert.gguf import GGUF

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # values of tokenizer.ggml.token_type; 1 is a normal token
MAX_PIECE_CHARS = 512

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the text is cut by each expression in turn
SPLITS = {
    "gpt-2": (GPT2_WORDS,),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "llama-bpe": (LLAMA3_WORDS,),
    "qwen2": (LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}


@contextmanager
def rust_errors(path: Path, what: str) -> Iterator[None]:
    """Turn the plain exceptions and panics of the `tokenizers` package into BadFile."""
    try:
        yield
    except BadFile:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadFile(path, f"{what}: {shown(str(error), 200)}") from error


def typed(gguf: "GGUF", key: str, kind: type, otherwise: Any) -> Any:
    """A metadata value that must be of one type, or `otherwise` if it is not there."""
    found = gguf.metadata.get(key, otherwise)
    if found is not otherwise and type(found) is not kind:
        raise BadFile(gguf.path, f"{key} is {shown(found)}; expected a {kind.__name__}")
    return found


def pre_tokenizer(gguf: "GGUF") -> str:
    """The name of the file's way to cut text into words, one of `SPLITS`."""
    given = typed(gguf, "tokenizer.ggml.pre", str, "default")
    name: str = SAME_AS.get(given, given)
    if name not in SPLITS:
        accepted = ", ".join([*SPLITS, *SAME_AS])
        raise BadFile(gguf.path, f"tokenizer.ggml.pre is {shown(given)}; supported: {accepted}")
    return name


def core_from_gguf(gguf: "GGUF") -> tk.Tokenizer:
    """Build the tokenizer: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        BadFile: another kind, or a vocabulary that contradicts itself.
    """
    kind = typed(gguf, "tokenizer.ggml.model", str, None)
    if kind not in ("gpt2", "llama"):
        raise BadFile(gguf.path, f"tokenizer.ggml.model is {shown(kind)}; supported: gpt2, llama")
    tokens = _strings(gguf, "tokens")
    types = _types(gguf, len(tokens))
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocab[token] != number)
        raise BadFile(
            gguf.path, f"tokenizer.ggml.tokens holds {shown(twice)} twice; each token may stand once"
        )
    with rust_errors(gguf.path, "the tokenizer cannot be built"):
        core = (_byte_level if kind == "gpt2" else _sentencepiece)(gguf, tokens, vocab, types)
        for kinds, add in ((CONTROL, core.add_special_tokens), (USER_DEFINED, core.add_tokens)):
            named = [tokens[number] for number in np.flatnonzero(types == kinds) if tokens[number]]
            add([tk.AddedToken(token, normalized=False, special=kinds == CONTROL) for token in named])
    return core


def _strings(gguf: "GGUF", key: str) -> list[str]:
    found = gguf.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise BadFile(
            gguf.path, f"tokenizer.ggml.{key} is {shown(type(found).__name__)}; expected an array of strings"
        )
    return found


def _numbers(gguf: "GGUF", key: str, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    found = gguf.metadata[f"tokenizer.ggml.{key}"]
    if not isinstance(found, np.ndarray) or len(found) != count:
        raise BadFile(
            gguf.path, f"tokenizer.ggml.{key} must be an array of {count} numbers, one for each token"
        )
    return found.astype(np.float64)


def _types(gguf: "GGUF", count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    if "tokenizer.ggml.token_type" not in gguf.metadata:
        return np.ones(count)
    return _numbers(gguf, "token_type", count)


def _merges(gguf: "GGUF", vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    found = []
    for merge in _strings(gguf, "merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise BadFile(gguf.path, f"the merge {shown(merge)} does not join two tokens into a third")
        found.append((left, right))
    return found


def _byte_level(gguf: "GGUF", tokens: list[str], vocab: dict[str, int], types: object) -> tk.Tokenizer:
    pre = pre_tokenizer(gguf)
    bpe = models.BPE(vocab, _merges(gguf, vocab), ignore_merges=pre == "llama-bpe")
    core = tk.Tokenizer(bpe)
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tk.Regex(split), "isolated") for split in SPLITS[pre]]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(
    gguf: "GGUF",
    tokens: list[str],
    vocab: dict[str, int],
    types: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> tk.Tokenizer:
    if "tokenizer.ggml.merges" in gguf.metadata:
        merges = _merges(gguf, vocab)
    else:
        merges = _merges_from_scores(gguf, tokens, types)
    unknown = np.flatnonzero(types == UNKNOWN)
    bpe = models.BPE(
        vocab,
        merges,
        unk_token=tokens[unknown[0]] if len(unknown) else None,
        fuse_unk=True,
        byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
    )
    core = tk.Tokenizer(bpe)
    prefix = typed(gguf, "tokenizer.ggml.add_space_prefix", bool, True)
    start = [normalizers.Prepend(SPACE_MARK)] if prefix else []
    core.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE_MARK)])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return core


def _merges_from_scores(
    gguf: "GGUF", tokens: list[str], types: "np.ndarray[tuple[int], np.dtype[np.float64]]"
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the piece of the best score first (SentencePiece's way)."""
    if "tokenizer.ggml.scores" not in gguf.metadata:
        raise BadFile(gguf.path, "has neither tokenizer.ggml.merges nor tokenizer.ggml.scores; one is needed")
    scores = _numbers(gguf, "scores", len(tokens))
    order = [number for number in np.argsort(-scores, kind="stable") if types[number] == 1]
    pieces = {tokens[number] for number in order}
    merges = []
    for number in order:
        piece = tokens[number]
        if len(piece) > MAX_PIECE_CHARS:
            raise BadFile(gguf.path, f"token {number} has {len(piece)} characters; at most {MAX_PIECE_CHARS}")
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in pieces and right in pieces]
    return merges
