"""Texts, order and batches: nothing lost, nothing twice, the same everywhere."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.small import TEXT, write
from writehead.convert.tokenizer import Tokenizer
from writehead.train.batches import Lanes, Samples, Windows
from writehead.train.config import DataConfig
from writehead.train.corpus import files, pairs, texts
from writehead.train.data import prepare, start_token
from writehead.train.order import Order, mix, shuffled
from writehead.train.tokens import Encode, labels_of, make_tokenizer, read_stream, train_bpe, write_stream

TOKENS = np.arange(103, dtype=np.uint16)


def whole(sources: list[str]) -> list[str]:
    """The documents, put together from their pieces."""
    documents, held = [], ""
    for text in texts(sources):
        held += text.text
        if text.ends:
            documents.append(held)
            held = ""
    assert held == ""
    return documents


def splitmix(x: int) -> int:
    """Steele, Lea and Flood's mixing function, in whole numbers of Python."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_files_folders_jsonl_and_gzip_give_their_documents(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, "b.txt", "second\r\nline")
    write(folder, "a.md", "first")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"third\n"))
    (folder / "d.jsonl").write_text('{"text": "fourth"}\n{"text": "fifth", "more": 1}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "empty.py").write_text("")
    assert whole([str(folder)]) == ["first", "second\r\nline", "third\n", "fourth", "fifth"]


def test_a_long_text_comes_in_pieces_of_one_document(tmp_path: Path) -> None:
    long = "a line of some length\n" * 120_000
    path = write(tmp_path, text=long)
    pieces = list(texts([path]))
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) == 3
    assert "".join(p.text for p in pieces) == long


@pytest.mark.slow
def test_the_embedded_corpus_is_pythons_library_without_its_tests() -> None:
    found = files(["stdlib"])
    names = {p.name for p in found}
    assert {"json", "asyncio"} <= {p.parent.name for p in found}
    assert "argparse.py" in names
    assert not any("test" in p.parts or "site-packages" in p.parts for p in found)
    assert found == files(["stdlib"])
    assert found != sorted(found)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b"fine\n\xff\n", r"a.txt, line 2: is not UTF-8 text \(byte 0\)"),
        ("a.txt.gz", b"no gzip", r"a.txt.gz: is broken gzip"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a.txt.gz: is broken gzip"),
        ("a.jsonl", b'{"text": "x"}\nnone\n', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a.jsonl, line 1: the text is missing; the line has .txt"),
        ("a.jsonl", b'{"text": [1]}\n', r"a.jsonl, line 1: text is .*; expected a text"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: is no JSON object with text"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_with_its_line(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        whole([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\nc\td\te\n", "line 2: has 3 columns, not the 2 of source and target: a stray tab?"),
        ("a\tb\nc\n", "line 2: has 1 columns, not the 2 of source and target: the target is missing"),
        ("a\tb\n\td\n", "line 2: the source is missing"),
        ("a\t \n", "line 1: the target is missing"),
    ],
)
def test_a_line_with_a_stray_tab_or_a_missing_column_is_named(
    text: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "pairs.tsv", text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}, {message}')}$"):
        list(pairs([path], ("source", "target")))


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no 'nothing\.txt'; give a file, a folder, or 'stdlib'"):
        files(["nothing.txt"])
    with pytest.raises(ValueError, match="holds no text files"):
        files([str(tmp_path)])


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_shuffle_is_a_permutation(count: int, key: int) -> None:
    assert sorted(shuffled(np.arange(count), count, key).tolist()) == list(range(count))


def test_the_order_is_the_same_on_every_machine_and_differs_by_epoch_and_seed() -> None:
    assert mix(1, 2, 3) == splitmix(splitmix(splitmix(1) ^ 2) ^ 3)
    order = [Order(10, 5, seed)(step).tolist() for seed in (0, 1) for step in (0, 1, 2, 3)]
    assert sorted(order[0] + order[1]) == sorted(order[2] + order[3]) == list(range(10))
    assert len({tuple(one) for one in order}) == len(order)


@given(count=st.integers(1, 20), batch=st.integers(1, 9), pool=st.integers(1, 3), bucket=st.booleans())
def test_every_sample_comes_once_an_epoch(count: int, batch: int, pool: int, bucket: bool) -> None:
    lengths = np.arange(count) % 7 if bucket else None
    order = Order(count, batch, 3, lengths, pool)
    rounds = count * batch * pool  # steps after which whole epochs and whole pools end together
    seen = np.concatenate([order(step) for step in range(rounds // batch)])
    assert np.bincount(seen, minlength=count).tolist() == [len(seen) // count] * count


def test_bucketed_batches_hold_samples_of_about_one_length() -> None:
    lengths = np.array([mix(i) % 50 for i in range(1000)])
    spread = [np.ptp(lengths[Order(1000, 8, 0, lengths)(step)]) for step in range(50)]
    assert np.mean(spread) < 3
    plain = [np.ptp(lengths[Order(1000, 8, 0)(step)]) for step in range(50)]
    assert np.mean(plain) > 20


def test_windows_cover_the_stream_and_targets_follow_their_tokens() -> None:
    windows = Windows(TOKENS, 10, 5, seed=1)
    first = torch.cat([windows(step).tokens for step in range(2)])  # an epoch: ten windows
    assert torch.equal(torch.cat([windows(step).target for step in range(2)]), first + 1)
    starts = sorted(first[:, 0].tolist())
    assert [b - a for a, b in pairwise(starts)] == [10] * 9
    assert {min(windows(2 * epoch).tokens[:, 0] % 10).item() for epoch in range(30)} == {
        0,
        1,
        2,
    }  # every offset


def test_validation_windows_come_in_order_and_all() -> None:
    held = Windows(TOKENS, 10, 4, None)
    assert held.count == 3
    assert [len(held(i).tokens) for i in range(3)] == [4, 4, 2]
    assert torch.equal(torch.cat([held(i).tokens for i in range(3)]).flatten(), torch.arange(100))


def test_lanes_go_on_where_they_stopped_and_start_anew_at_their_end() -> None:
    lanes = Lanes(TOKENS, 8, 3)
    batches = [lanes(step) for step in range(lanes.count + 1)]
    rows = torch.cat([b.tokens for b in batches[:-1]], 1)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)
    assert [b.fresh for b in batches] == [True, *[False] * (lanes.count - 1), True]
    assert torch.equal(batches[-1].tokens, batches[0].tokens)


def test_pieces_of_a_batch_make_up_the_batch() -> None:
    batch = Windows(TOKENS, 10, 6, seed=0)(0)
    assert torch.equal(torch.cat([batch.piece(i, 3).tokens for i in range(3)]), batch.tokens)
    assert torch.equal(torch.cat([batch.piece(i, 2).target for i in range(2)]), batch.target)


def test_pairs_become_shifted_targets_with_their_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "p.tsv", "ab\txyz\nc\tw\n" * 5)
    data = prepare(DataConfig(kind="parallel", train=(path,), holdout=0.5, batch=2, length=9), tmp_path, 0)
    tokenizer, end = data.tokenizer, sorted(data.tokenizer.eos)[0]
    assert isinstance(data.valid, Samples)
    rows = {
        (tuple(s), tuple(t), tuple(x))
        for b in (data.valid(0), data.valid(1), data.valid(2))
        for s, t, x in zip(b.source.tolist(), b.tokens.tolist(), b.target.tolist(), strict=True)
    }
    start, (x, y, z, w) = start_token(tokenizer), b"xyzw"
    assert ((97, 98, end), (start, x, y, z), (x, y, z, end)) in rows
    assert any(target[:2] == (w, end) and tokens[:2] == (start, w) for _, tokens, target in rows)
    assert all((a < 0) == (b < 0) for _, t, x in rows for a, b in zip(t, x, strict=True))


def test_labels_become_tokens_and_long_texts_are_cut_with_a_note(tmp_path: Path) -> None:
    path = write(tmp_path, "l.tsv", "bad\tshort\ngood\tmuch too long a text\n" * 10)
    data = prepare(DataConfig(kind="labelled", train=(path,), length=6, batch=4), tmp_path, 0)
    assert list(labels_of(data.tokenizer)) == ["bad", "good"]
    assert data.choices == (259, 260)
    assert sum(int(note.split()[0]) for note in data.notes) == 10
    assert all(note.endswith("texts are longer than 6 tokens and were cut") for note in data.notes)
    batch = data.train(0)
    for row, target in zip(batch.tokens, batch.target, strict=True):
        assert bytes(row[row >= 0].tolist()) == (b"short" if target.item() == 0 else b"much t")


def test_data_that_is_too_short_or_has_one_label_is_refused(tmp_path: Path) -> None:
    def refused(message: str, name: str, text: str, **values: object) -> None:
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(ValueError, match=message):
            prepare(DataConfig(train=(write(folder, f"{name}.tsv", text),), **values), folder, 0)  # type: ignore[arg-type]

    refused("the training text has 94 tokens, data.length=256 needs more; nearest is 94", "short", "x" * 99)
    refused(
        "the validation text has 9 tokens, data.length=20 needs more; nearest is 9",
        "held",
        "x" * 199,
        length=20,
    )
    refused("only one|one label only, 'a'", "one", "a\tb\n" * 9, kind="labelled")
    refused(
        "no pair has at most data.length=2 tokens", "long", "long\tlonger\n" * 9, kind="parallel", length=2
    )
    refused("1 lines of data are too few to hold 5% out", "few", "a\tb\n", kind="parallel")


def test_carried_rows_need_a_lane_each(tmp_path: Path) -> None:
    config = DataConfig(train=(write(tmp_path, text=TEXT[:1000]),), batch=16, length=64, holdout=0.1)
    with pytest.raises(ValueError, match=r"has 56 tokens in each of 16 rows, data.length=64 needs more"):
        prepare(config, tmp_path, 0, carry=True)


def test_a_label_that_training_did_not_have_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path, "t.tsv", "good\ta\nbad\tb\n")
    valid = write(tmp_path, "v.tsv", "god\ta\n")
    with pytest.raises(ValueError, match=r"unknown label 'god'; did you mean 'good'\?"):
        prepare(DataConfig(kind="labelled", train=(train,), valid=(valid,)), tmp_path, 0)


def test_a_stream_holds_every_document_and_its_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    path = tmp_path / "x.tokens"
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"text": "<|eos|> é"}) + "\n" + json.dumps({"text": "b c"}) + "\n"
    )
    stream = write_stream(path, tokenizer, texts([str(tmp_path / "d.jsonl")]))
    assert stream.tokens.tolist() == [
        *"<|eos|> é".encode(),
        257,
        *b"b c",
        257,
    ]  # a special token in a text is text
    assert (stream.counts.documents, stream.counts.words, stream.counts.bytes) == (2, 4, 13)
    again = read_stream(path)
    assert again is not None
    assert again.counts == stream.counts
    assert again.tokens.tolist() == stream.tokens.tolist()
    path.write_bytes(path.read_bytes()[:-2] + b"ab")
    with pytest.raises(ValueError, match=r"is not the file that x.tokens.json describes; delete both"):
        read_stream(path)


def test_a_trained_tokenizer_gives_texts_back_and_spends_fewer_tokens(tmp_path: Path) -> None:
    bpe = train_bpe(300, [TEXT])
    (ids,) = Encode(bpe)([TEXT + "<|bos|> Ünï"])
    assert bpe.decode(map(int, ids)) == TEXT + "<|bos|> Ünï"
    assert len(ids) < len(TEXT) / 2
    assert bpe.vocab == 300
    bpe.save(tmp_path)
    assert (
        Encode(make_tokenizer({"name": "folder", "path": str(tmp_path)}, ()))([TEXT])[0].tolist()
        == Encode(bpe)([TEXT])[0].tolist()
    )
    assert train_bpe(300, [TEXT]).core.to_str() == bpe.core.to_str()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "bpe"}, "tokenizer 'bpe' needs vocab"),
        ({"name": "bpe", "vocab": 100}, "a BPE vocabulary of 100 must be at least 259"),
        ({"name": "bpe", "vocab": 300}, "the text gives only 259 tokens, not vocab=300; nearest is 259"),
        ({"name": "bytes", "vocab": 5}, "unknown argument of tokenizer 'bytes' 'vocab'"),
        ({"name": "bits"}, "unknown tokenizer 'bits'; did you mean 'bytes'"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tokenizer(spec, ["a"])
