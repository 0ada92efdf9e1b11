"""Perplexity is what its definition says, token by token, under each protocol."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from writehead.config import ModelConfig
from writehead.convert.tokenizer import Tokenizer
from writehead.evaluate.perplexity import perplexity, score, score_carried
from writehead.model.decoder import Decoder

TOKENS = np.random.default_rng(0).integers(0, 11, 40).astype(np.uint16)


def model(vocab: int = 11, **values: Any) -> Decoder:
    torch.manual_seed(3)
    config = {"vocab": vocab, "dim": 16, "depth": 2, "mixer": {"name": "mqa", "heads": 2}, **values}
    made = Decoder(ModelConfig.from_dict(config)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return made


def nats(made: Decoder, tokens: np.ndarray, at: int, first: int) -> float:
    """What token `at` costs after the tokens from `first` on."""
    with torch.inference_mode():
        logits, _ = made(torch.from_numpy(tokens[first:at].astype(np.int64))[None])
    return -logits[0, -1].log_softmax(-1)[int(tokens[at])].item()


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (39, 39), (64, 5), (5, 5)])
@pytest.mark.parametrize("batch", [1, 4])
def test_each_token_is_scored_once_after_what_its_window_shows(window: int, stride: int, batch: int) -> None:
    made, expected = model(), 0.0
    for at in range(1, len(TOKENS)):
        row = max(0, math.ceil((at - window) / stride))  # the first window that reaches the token
        expected += nats(made, TOKENS, at, row * stride)
    assert score(made, TOKENS, window, stride, batch) == pytest.approx(expected, rel=1e-6)


def test_sliding_one_by_one_scores_better_than_windows_apart_on_text_with_memory() -> None:
    rhyme = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9] * 6, np.uint16)
    made = model()
    whole = score(made, rhyme, 60, 60, 1)
    assert score(made, rhyme, 60, 1, 4) == pytest.approx(whole, rel=1e-6)  # one window holds everything
    assert score(made, rhyme, 6, 6, 4) != pytest.approx(whole, rel=1e-3)


def test_carried_states_read_the_whole_past() -> None:
    made = model()
    assert score_carried(made, TOKENS, 7) == pytest.approx(score(made, TOKENS, 64, 64, 1), rel=1e-6)


def test_words_bytes_and_tokens_share_the_same_nats(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("an é\nand more words", encoding="utf-8")
    made = model(vocab=259, max_context=16)
    found = perplexity(made, Tokenizer.bytes(), (str(path),))
    assert (found.window, found.stride, found.documents, found.words, found.bytes) == (16, 16, 1, 5, 20)
    tokens = np.array([257, *path.read_bytes(), 257], np.uint16)
    assert found.tokens == 21
    assert found.nll == pytest.approx(score(made, tokens, 16, 16, 1), rel=1e-6)
    assert found.per_token == pytest.approx(math.exp(found.nll / 21))
    assert found.per_word == pytest.approx(math.exp(found.nll / 5))
    assert found.per_byte == pytest.approx(math.exp(found.nll / 20)) == pytest.approx(2**found.bits_per_byte)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "window=0 must be from 1 to any number of positions"),
        ({"window": 8, "stride": 9}, "stride=9 must be from 1 to window=8"),
        (
            {"window": 8, "stride": 4, "carry": True},
            "stride=4 does not go with carry, whose windows do not overlap",
        ),
    ],
)
def test_a_protocol_that_cannot_be_had_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        perplexity(model(vocab=259), Tokenizer.bytes(), (str(tmp_path / "text.txt"),), **values)


def test_learned_positions_bound_the_window_and_carrying(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    made = model(vocab=259, position={"name": "learned", "max_context": 12})
    sources = (str(tmp_path / "text.txt"),)
    assert perplexity(made, Tokenizer.bytes(), sources).window == 12
    with pytest.raises(ValueError, match="window=13 must be from 1 to 12 positions"):
        perplexity(made, Tokenizer.bytes(), sources, window=13)
    with pytest.raises(ValueError, match="carry needs positions without end; this model has 12"):
        perplexity(made, Tokenizer.bytes(), sources, carry=True)
