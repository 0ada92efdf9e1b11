"""Words are masked whole, sentences hidden whole, and the losses are their formulas."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import masked as paper
from small import assert_same, begun, log, train, values, write

from writehead.config import ModelConfig
from writehead.convert.tokenizer import Tokenizer
from writehead.model.encoder import Encoder
from writehead.train.batches import Batch, Windows
from writehead.train.config import LossConfig, MaskConfig
from writehead.train.masked import MASKED, RANDOM, Marks, Masked, add_masks, contrast
from writehead.train.objective import Objective

TOKENIZER = add_masks(Tokenizer.bytes())
MARKS = Marks(TOKENIZER)
TEXT = "One two.  Three, four! A e.g. of five words.\n\n  A line\nwith no stop and a long tail of words " * 40
MODEL: dict[str, Any] = {
    "kind": "encoder",
    "dim": 16,
    "depth": 2,
    "mixer": {"name": "etc", "heads": 2, "radius": 4, "clip": 3, "tokens": 5},
    "feedforward": {"name": "dense", "hidden": 24},
    "position": {"name": "none"},
    "stack": {"name": "residual", "order": "post", "norm": "layer", "last_norm": False},
}
MASKS = {"words": 0.3, "summaries": 5, "sentences": 0.4, "sentence": 20}


def ids(text: str) -> Any:
    return np.array(TOKENIZER.encode(text))


def batches(length: int = 90, rows: int = 3, **masks: Any) -> Masked:
    return Masked(Windows(ids(TEXT), length, rows, 0), MARKS, MaskConfig(**{**MASKS, **masks}), 1)


def plain(length: int, rows: int, step: int) -> Any:
    return Windows(ids(TEXT), length, rows, 0)(step).tokens


def parts(text: str, numbers: Any) -> list[str]:
    """The text cut where a number changes."""
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(text)]
    return [text[a:b] for a, b in pairwise(cuts)]


def test_sentences_end_at_stops_before_words_and_at_the_last_of_several_line_ends() -> None:
    text = "One two.  Three, four! A e.g. of it.\n\n  A line\nno stop"
    found = parts(text, MARKS.sentences(ids(text), 99))
    assert found == ["One two.", "  Three, four!", " A e.g.", " of it.", "\n\n", "  A line\n", "no stop"]
    assert parts("a line that is long", MARKS.sentences(ids("a line that is long"), 8)) == [
        "a line t",
        "hat is l",
        "ong",
    ]


def test_words_have_the_white_space_before_them_and_end_with_their_sentence() -> None:
    text = "a line\n  of  two.x words"
    found = parts(text, MARKS.words(ids(text), MARKS.sentences(ids(text), 99)))
    assert found == ["a", " line", "\n", "  of", "  two.x", " words"]


def test_hidden_sentences_leave_their_summaries_and_nothing_to_guess() -> None:
    given = batches()
    for step in range(4):
        batch, rows = given(step), plain(90, 3, step)
        assert batch.owners is not None
        assert batch.alone is not None
        assert batch.asked is not None
        for b, row in enumerate(rows.numpy()):
            sentence = MARKS.sentences(row, 20)
            owners = torch.from_numpy(np.where(sentence < 5, sentence, -1))
            assert torch.equal(batch.owners[b, 5:], owners)
            assert (batch.owners[b, :5] == -1).all()
            there = min(5, sentence[-1] + 1)
            assert batch.tokens[b, :5].tolist() == [MARKS.summary] * there + [-1] * (5 - there)
            hidden = [n for n in batch.asked[b].tolist() if n >= 0]
            assert len(hidden) == max(1, round(0.4 * there))
            for n, alone in zip(batch.asked[b].tolist(), batch.alone[b], strict=True):
                inside = torch.from_numpy(sentence == n)
                assert (batch.tokens[b, 5:][inside] == MARKS.mask).all()
                assert (batch.target[b, 5:][inside] == -1).all()
                wanted = [] if n < 0 else [MARKS.summary, *row[sentence == n]]
                assert alone[alone >= 0].tolist() == wanted
                assert (alone[1:5] == -1).all()


def test_words_are_guessed_whole_and_so_many_as_asked() -> None:
    given, kept, noise, guessed = batches(sentences=0.0), 0, 0, 0
    for step in range(60):
        batch, rows = given(step), plain(90, 3, step)
        for tokens, target, row in zip(batch.tokens[:, 5:], batch.target[:, 5:], rows, strict=True):
            word = torch.from_numpy(MARKS.words(row.numpy(), MARKS.sentences(row.numpy(), 20)))
            chosen = torch.unique(word[target >= 0])
            assert len(chosen) == max(1, round(0.3 * int(word[-1] + 1)))
            for n in chosen:
                assert torch.equal(target[word == n], row[word == n])
                same = torch.equal(tokens[word == n], row[word == n])
                masks = bool((tokens[word == n] == MARKS.mask).all())
                guessed, kept, noise = guessed + 1, kept + same, noise + (not same and not masks)
            others = ~torch.isin(word, chosen)
            assert torch.equal(tokens[others], row[others])
            assert (target[others] == -1).all()
    assert kept / guessed == pytest.approx(1 - MASKED - RANDOM, abs=0.03)
    assert noise / guessed == pytest.approx(RANDOM, abs=0.03)


def test_masks_are_a_function_of_the_step_and_differ_between_steps_and_rows() -> None:
    one, other = batches(), batches()
    for step in (7, 2):
        first, second = one(step), other(step)
        assert all(
            torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor)
        )
    guesses = {tuple((batches(rows=3)(s).target[b] >= 0).tolist()) for s in range(3) for b in range(3)}
    assert len(guesses) == 9


def test_pieces_of_a_batch_take_their_hidden_sentences_along() -> None:
    whole = batches(rows=4)(0)
    halves = [whole.piece(i, 2) for i in range(2)]
    for name in ("tokens", "target", "owners", "alone", "asked"):
        torch.testing.assert_close(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert whole.read == sum(half.read for half in halves)
    assert whole.alone is not None
    assert whole.read == int((whole.tokens >= 0).sum() + (whole.alone >= 0).sum())


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_loss_is_that_of_masked_words_and_of_sentences_named_by_their_summaries(chunk: int) -> None:
    model = Encoder(ModelConfig.from_dict({**MODEL, "vocab": TOKENIZER.vocab})).double()
    given = batches(length=60)(1)
    sums, _ = Objective(model, LossConfig(chunk=chunk, aux={"cpc_loss": 0.25}))(given)
    words, told, said = 0.0, [], []
    for row in range(3):
        one = Batch(*(t[row : row + 1] if isinstance(t, torch.Tensor) else t for t in given))
        assert one.alone is not None
        assert one.asked is not None
        x, _, _ = model(one.tokens, owners=one.owners)
        words += paper.nll(model.logits(x)[0].tolist(), one.target[0].tolist())
        for n, alone in zip(one.asked[0].tolist(), one.alone[0], strict=True):
            if n >= 0:
                sentence = alone[alone >= 0]
                alone = torch.cat([sentence[:1], torch.full((4,), -1), sentence[1:]])[None]
                owners = torch.tensor([[-1] * 5 + [0] * (len(sentence) - 1)])
                told.append(x[0, n].tolist())
                said.append(model(alone, owners=owners)[0][0, 0].tolist())
    assert len(told) > 3
    assert sums.nll.item() == pytest.approx(words, rel=1e-5)
    assert sums.loss.item() == pytest.approx(
        words + 0.25 * given.scored * paper.contrast(told, said), rel=1e-5
    )


def test_the_contrast_pulls_both_sides_and_is_nothing_for_one_sentence() -> None:
    a, b = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = contrast(a, b)
    assert loss.item() == pytest.approx(paper.contrast(a.tolist(), b.tolist()), rel=1e-6)
    for found in torch.autograd.grad(loss, (a, b)):
        assert found.abs().max() > 1e-3
    assert contrast(a[:1], b[:1]).item() == 0
    assert contrast(a[:0], b[:0]).item() == 0


@pytest.mark.slow
def test_a_run_learns_and_goes_on_with_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    text = write(tmp_path)
    data = {"kind": "masked", "train": [text], "length": 48, "batch": 4}
    loss = {"aux": {"cpc_loss": 0.25}}
    given = values(text, data=data, masks=MASKS, loss=loss)
    given["model"] = {**MODEL, "stack": {**MODEL["stack"], "dropout": 0.1}}
    last = train(given, tmp_path / "whole")
    with begun(given, tmp_path / "cut") as trainer:
        while trainer.step < 4:
            trainer.make_step()
        trainer.save()
    assert_same(train(given, tmp_path / "cut", resume="auto"), last)
    lines = [line["train/loss"] for line in log(tmp_path / "whole") if "train/loss" in line]
    assert lines[-1] < lines[0]
    config = ModelConfig.read(last / "config.json")
    assert config.max_context == 48 + 5
    saved = Tokenizer.from_directory(last)
    assert saved.core.get_vocab()["<|mask|>"] < config.vocab == saved.vocab


@pytest.mark.parametrize("mixer", ["bidirectional", "big_bird"])
def test_words_alone_can_be_guessed_by_any_encoder(mixer: str, tmp_path: Path) -> None:
    text = write(tmp_path)
    given = values(text, data={"kind": "masked", "train": [text], "length": 48, "batch": 4})
    more = {"block": 8, "random": 1} if mixer == "big_bird" else {}
    given["model"] = {
        **MODEL,
        "mixer": {"name": mixer, "heads": 2, **more},
        "position": {"name": "sinusoidal"},
    }
    train(given, tmp_path / "run")
    lines = [line["train/loss"] for line in log(tmp_path / "run") if "train/loss" in line]
    assert lines[-1] < lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": {"words": 0}}, r"masks.words=0 must be above 0 and at most 1, masks.sentences=0.0 from 0"),
        ({"masks": {"sentences": 1.0}}, "masks.sentences=1.0 from 0 up to 1"),
        (
            {"masks": {"sentences": 0.1}},
            "hides sentences of which summaries tell: set masks.summaries above 0",
        ),
        ({"masks": {"sentence": 0}}, "masks.sentence=0 must be at least 1"),
        ({"data": {"kind": "text"}, "masks": {"words": 0.2}}, "masks are for data.kind='masked'; got 'text'"),
        (
            {"model": {"dim": 8, "depth": 1}},
            "'masked' trains a model of kind encoder; got model.kind='decoder'",
        ),
        ({"loss": {"aux": {"cpc_los": 1}}, "masks": MASKS}, "did you mean 'cpc_loss'"),
        ({"masks": {"summaries": 6}}, "masks.summaries=6 must be the mixer etc's tokens=5"),
    ],
)
def test_masks_that_cannot_be_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = write(tmp_path)
    given = values(text, data={"kind": "masked", "train": [text], "length": 48, "batch": 4})
    given["model"] = MODEL
    for name, section in changes.items():
        given[name] = section if name in ("masks", "model") else {**given.get(name, {}), **section}
    if given["data"]["kind"] == "text":
        given["model"] = {"dim": 8, "depth": 1, "mixer": {"name": "mqa", "heads": 2}}
    with pytest.raises(ValueError, match=message), begun(given, tmp_path / "run") as trainer:
        trainer.make_step()
