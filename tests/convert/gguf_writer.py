"""Tiny GGUF files written byte by byte, so that a test may spoil any one field."""

import struct
from pathlib import Path
from typing import Any

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "B", U64: "Q", 11: "q", 12: "d"}
GOOD_PAIRS = (
    ("general.architecture", STRING, "llama"),
    ("llama.block_count", U32, 2),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "é"])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.5, -1.0, 2.0])),
    ("tokenizer.ggml.add_bos_token", BOOL, 1),
)
GOOD_TENSORS = (
    ("token_embd.weight", (32, 2), 8, 0),  # Q8_0: 68 bytes
    ("output_norm.weight", (4,), 0, 96),  # F32: 16 bytes
)
DATA_BYTES = 96 + 16


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def value(kind: int, given: Any) -> bytes:
    if isinstance(given, bytes):
        return given
    if kind == STRING:
        return text(given)
    if kind == ARRAY:
        inner, items = given
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack("<" + CODES[kind], given)


def pair(key: str | bytes, kind: int, given: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + value(kind, given)


def tensor(name: str | bytes, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<{len(sizes)}Q", *(size % 2**64 for size in sizes))
    return text(name) + struct.pack("<I", len(sizes)) + shape + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    pairs: Any = GOOD_PAIRS,
    tensors: Any = GOOD_TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
    data: bytes | None = None,
) -> bytes:
    """A file; entries given as bytes are written as they are."""
    n_tensors, n_pairs = (
        len(x) if given is None else given for x, given in zip((tensors, pairs), counts, strict=True)
    )
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(given if isinstance(given, bytes) else pair(*given) for given in pairs)
    head += b"".join(given if isinstance(given, bytes) else tensor(*given) for given in tensors)
    head += bytes(-len(head) % alignment)
    return head + (bytes(range(DATA_BYTES)) if data is None else data)


def write_gguf(path: Path, *args: Any, **kwargs: Any) -> Path:
    path.write_bytes(gguf_bytes(*args, **kwargs))
    return path
