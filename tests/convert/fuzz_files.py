"""Spoiled model files by the thousand: `python fuzz_files.py KIND SEED COUNT` loads each, prints a summary.

It runs as a process of its own, so that an allocation out of proportion hits the limit on its memory.
"""

import json
import random
import resource
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf_writer as gw
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from writehead.convert.errors import BadFile
from writehead.convert.files import read_tensors, write_tensors
from writehead.convert.gguf import Cursor, open_gguf
from writehead.convert.quants import DECODERS
from writehead.convert.strict_json import read_json
from writehead.convert.tokenizer import Tokenizer

SPARE_BYTES = 2**27  # address space beyond what the process has when it starts on the files
MEMORY_FACTOR, MEMORY_FLOOR = 24, 2**18  # Python's own peak: at most this many times the file, and this much
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # truncating a file on a disk takes a millisecond
EXTREMES = (0, 1, 2, 3, 7, 9, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63 - 1,
    2**63,
    2**70,
    1.5,
    1e308,
    "",
    "F32",
    "x",
    "../x",
    "\ud800",
    [],
    {},
)
ODD_TEXT = (
    b"NaN",
    b"-Infinity",
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b"1e999",
    b"\xff\xfe",
    b'"\\ud800"',
    b"\0",
)


def spoil_bytes(data: bytes, chosen: random.Random) -> bytes:
    """Change a file without knowing what it means."""
    found = bytearray(data)
    at = chosen.randrange(len(found)) if found else 0
    length = chosen.choice((1, 2, 4, 8, 64))
    match chosen.randrange(7):
        case 0:
            for _ in range(chosen.randint(1, 8)):
                found[chosen.randrange(len(found))] ^= 1 << chosen.randrange(8)
        case 1:
            del found[at:]
        case 2:
            found[at : at + length] = chosen.randbytes(length)
        case 3:
            found[at:at] = chosen.choice(ODD_TEXT)
        case 4:
            del found[at : at + length]
        case 5:
            found[at:at] = found[max(0, at - length) : at] * chosen.randint(1, 9)
        case _:
            found[at : at + 8] = chosen.choice(EXTREMES).to_bytes(8, "little")
    return bytes(found)


def spoil_fields(data: bytes, fields: list[tuple[int, int]], chosen: random.Random) -> bytes:
    """Put an extreme number, text that is none, or another field's bytes into one field of a binary file."""
    found = bytearray(data)
    for _ in range(chosen.choice((1, 1, 1, 2, 4))):
        at, count = chosen.choice(fields)
        if count in (4, 8) and chosen.random() < 0.8:
            number = chosen.choice((*EXTREMES, len(data), len(data) - at, chosen.randrange(64)))
            found[at : at + count] = (number % 256**count).to_bytes(count, "little")
        elif chosen.random() < 0.5:
            found[at : at + count] = b"\xff" * count
        else:
            start, size = chosen.choice(fields)
            found[at : at + count] = found[start : start + size]
    return bytes(found)


def spoil_object(value: object, chosen: random.Random) -> object:
    """Replace, add or drop something somewhere inside a JSON value."""
    if not isinstance(value, dict | list) or not value or chosen.random() < 0.2:
        return chosen.choice(ODD_VALUES)
    key = chosen.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    match chosen.randrange(6):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[chosen.choice(("extra", "", "__metadata__", "\udfff"))] = chosen.choice(ODD_VALUES)
        case 1 | 2:
            other = chosen.choice(list(value.values()) if isinstance(value, dict) else value)
            copy[key] = other
        case _:
            copy[key] = spoil_object(value[key], chosen)
    return copy


def spoil_json(value: dict[str, object], chosen: random.Random) -> bytes:
    if chosen.random() < 0.3:
        return spoil_bytes(json.dumps(value).encode(), chosen)
    return json.dumps(spoil_object(value, chosen)).encode()


def spoil_safetensors(header: dict[str, object], data: bytes, chosen: random.Random) -> bytes:
    text = spoil_json(header, chosen)
    length = len(text) if chosen.random() < 0.9 else chosen.choice(EXTREMES)
    whole = struct.pack("<Q", length) + text + data
    return spoil_bytes(whole, chosen) if chosen.random() < 0.1 else whole


def strings(key: str, items: list[str]) -> tuple[str, int, object]:
    return (f"tokenizer.ggml.{key}", gw.ARRAY, (gw.STRING, items))


def gguf_files() -> list[bytes]:
    """Sound files: tensors of several types, nested arrays, a byte-level and a SentencePiece vocabulary."""
    kinds = ((8, 32, 34), (3, 32, 20), (14, 256, 210), (0, 4, 16), (30, 8, 16), (20, 32, 18))
    tensors = tuple((f"blk.{i}.w", (values,), kind, 256 * i) for i, (kind, values, _) in enumerate(kinds))
    nested = ("deep", gw.ARRAY, (gw.ARRAY, [(gw.U32, [1, 2]), (gw.STRING, ["x"])]))
    plain = gw.gguf_bytes((*gw.GOOD_PAIRS, nested), tensors, data=bytes(range(256)) * len(kinds))
    byte_level = (
        ("tokenizer.ggml.model", gw.STRING, "gpt2"),
        ("tokenizer.ggml.pre", gw.STRING, "smollm"),
        strings("tokens", ["t", "h", "e", "th", "the", "1", "<end>"]),
        ("tokenizer.ggml.token_type", gw.ARRAY, (5, [1] * 6 + [3])),
        strings("merges", ["t h", "th e"]),
        ("tokenizer.ggml.eos_token_id", gw.U32, 6),
        ("tokenizer.ggml.add_bos_token", gw.BOOL, 0),
    )
    pieces = ["<unk>", "<s>", "</s>", "▁", "t", "h", "e", "▁t", "he", "▁the"]
    sentencepiece = (
        ("tokenizer.ggml.model", gw.STRING, "llama"),
        strings("tokens", pieces),
        ("tokenizer.ggml.scores", gw.ARRAY, (gw.F32, [-float(i) for i in range(len(pieces))])),
        ("tokenizer.ggml.token_type", gw.ARRAY, (5, [2, 3, 3] + [1] * 7)),
        ("tokenizer.ggml.bos_token_id", gw.U32, 1),
    )
    return [plain, gw.gguf_bytes(byte_level, ()), gw.gguf_bytes(sentencepiece, ())]


def fields_of(data: bytes, folder: Path) -> list[tuple[int, int]]:
    """Where the reader takes each field of a sound file."""
    seen: list[tuple[int, int]] = []
    path = folder / "sound.gguf"
    path.write_bytes(data)
    take = Cursor.take

    def recording(self: Cursor, count: int, what: str) -> bytes:
        seen.append((self.at, count))
        return take(self, count, what)

    Cursor.take = recording  # type: ignore[method-assign]
    try:
        open_gguf(path)
    finally:
        Cursor.take = take  # type: ignore[method-assign]
    return seen


def mutations(kind: str, seed: int, count: int, folder: Path) -> Iterator[dict[str, bytes]]:
    """Folders of files, each with one file spoiled: names and contents."""
    chosen = random.Random(seed)
    if kind == "gguf":
        files = [(data, fields_of(data, folder)) for data in gguf_files()]
        for data, fields in chosen.choices(files, k=count):
            spoil = chosen.random() < 0.3
            yield {"m.gguf": spoil_bytes(data, chosen) if spoil else spoil_fields(data, fields, chosen)}
    elif kind == "tokenizer":
        yield from tokenizer_folders(chosen, count)
    else:
        yield from (safetensors_folders if kind == "safetensors" else index_folders)(chosen, count, folder)


def safetensors_folders(chosen: random.Random, count: int, folder: Path) -> Iterator[dict[str, bytes]]:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.tensor(True),
    }
    (path,) = write_tensors(folder, tensors, metadata={"x": "y"})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for _ in range(count):
        if chosen.random() < 0.2:
            yield {"model.safetensors": spoil_bytes(whole, chosen)}
        else:
            yield {"model.safetensors": spoil_safetensors(header, data, chosen)}


def index_folders(chosen: random.Random, count: int, folder: Path) -> Iterator[dict[str, bytes]]:
    paths = write_tensors(folder, {f"w{i}": torch.full((4,), float(i)) for i in range(4)}, max_shard_bytes=32)
    sound = {path.name: path.read_bytes() for path in paths}
    index = "model.safetensors.index.json"
    config = {"model_type": "llama", "rope": {"type": "yarn", "factors": [1.0, 2.0]}, "layers": [1, [2, [3]]]}
    for _ in range(count):
        found = sound | {"config.json": json.dumps(config).encode()}
        name = chosen.choice((index, index, "config.json", "config.json", paths[0].name))
        if name == paths[0].name:
            found[name] = spoil_bytes(sound[name], chosen)
        else:
            found[name] = spoil_json(json.loads(found[name]), chosen)
        yield found


def tokenizer_folders(chosen: random.Random, count: int) -> Iterator[dict[str, bytes]]:
    core = Core(models.BPE({"t": 0, "h": 1, "e": 2, "th": 3, "the": 4, "Ġ": 5}, [("t", "h"), ("th", "e")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    files: dict[str, dict[str, object]] = {
        "tokenizer.json": json.loads(core.to_str()),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "add_bos_token": True,
        },
        "generation_config.json": {"eos_token_id": [7, 6]},
        "special_tokens_map.json": {"pad_token": "</s>"},
    }
    for _ in range(count):
        found = {name: json.dumps(value).encode() for name, value in files.items()}
        name = chosen.choice(("tokenizer.json", *files))
        found[name] = spoil_json(files[name], chosen)
        yield found


def load_gguf(folder: Path) -> None:
    file = open_gguf(folder / "m.gguf")
    for name, info in file.tensors.items():
        assert file.raw(name).numel() == info.nbytes
        if info.type in DECODERS:
            assert file.read(name).shape == info.shape
    if "tokenizer.ggml.model" in file.metadata:
        tokenizer = Tokenizer.from_gguf(file)
        tokenizer.decode(tokenizer.encode("the 12 é"))


def load_tensors(folder: Path) -> None:
    tensors = read_tensors(folder)
    for name in tensors:
        assert tensors[name].nbytes == tensors.entry(name).nbytes


def load_index(folder: Path) -> None:
    read_json(folder / "config.json")
    load_tensors(folder)


LOADERS: dict[str, Callable[[Path], object]] = {
    "gguf": load_gguf,
    "safetensors": load_tensors,
    "index": load_index,
    "tokenizer": Tokenizer.from_directory,
}


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def count_steps() -> list[int]:
    """Make every read of a GGUF file count; the returned list holds the number."""
    steps, take = [0], Cursor.take

    def counting(self: Cursor, count: int, what: str) -> bytes:
        steps[0] += 1
        return take(self, count, what)

    Cursor.take = counting  # type: ignore[method-assign]
    return steps


def run(kind: str, seed: int, count: int) -> dict[str, object]:
    """Load every mutation; anything but success and BadFile escapes."""
    reasons: dict[str, int] = {}
    there: dict[str, bytes] = {}
    loaded = worst = longest = 0
    with tempfile.TemporaryDirectory(dir=FAST) as sound, tempfile.TemporaryDirectory(dir=FAST) as spoiled:
        files = mutations(kind, seed, count, Path(sound))
        first = next(files)
        limit_memory()
        steps = count_steps()
        for number, contents in enumerate([first, *files]):
            for name, data in contents.items():
                if there.get(name) != data:
                    (Path(spoiled) / name).write_bytes(data)
            there = contents
            size = sum(map(len, contents.values()))
            measured = number % 10 == 0
            if measured:
                tracemalloc.start()
            steps[0] = 0
            try:
                LOADERS[kind](Path(spoiled))
                loaded += 1
            except BadFile as error:
                reason = "".join(letter for letter in error.problem[:40] if not letter.isdigit())
                reasons[reason] = reasons.get(reason, 0) + 1
                longest = max(longest, len(str(error)))
            except BaseException:
                print(f"mutation {number}: {contents!r}"[:20000], file=sys.stderr)
                raise
            assert steps[0] <= size + 64, f"mutation {number} took {steps[0]} reads of {size} bytes"
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                worst = max(worst, peak)
                assert peak < MEMORY_FACTOR * size + MEMORY_FLOOR, (
                    f"mutation {number} took {peak} of {size} bytes"
                )
    return {
        "count": count,
        "loaded": loaded,
        "refused": sum(reasons.values()),
        "reasons": len(reasons),
        "peak": worst,
        "longest": longest,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
