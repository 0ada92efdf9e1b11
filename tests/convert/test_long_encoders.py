"""Longformer and Big Bird checkpoints: what is particular to their windows, global tokens and random blocks."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from their_models import make
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile
from writehead.convert.huggingface import read_config, write_config
from writehead.convert.load import load, save
from writehead.core.pattern import Random
from writehead.decode.generate import generate
from writehead.model.encoder import Encoder
from writehead.model.parts import weights
from writehead.model.seq2seq import Seq2Seq

NO_POOLER = pytest.mark.filterwarnings("ignore:left out, since the model has no place:UserWarning")


def words(rows: int, length: int) -> Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_longformer_with_global_tokens_and_padding_gives_their_logits(tmp_path: Path) -> None:
    theirs = make("longformer, masked words")
    theirs.save_pretrained(tmp_path / "model")
    found = load(tmp_path / "model")
    mixers = tuple({**found.config.layer("mixer", i), "tokens": 2} for i in range(3))
    values = found.config.to_dict() | {"mixer": mixers}
    ours = Encoder(ModelConfig.from_dict(values)).eval()
    ours.load_state_dict(found.model.state_dict())
    ids, padding = words(2, 31), torch.ones(2, 31, dtype=torch.int64)
    padding[1, 19:] = 0
    ids[1, 19:] = 1
    marked = torch.zeros_like(ids)
    marked[:, :2] = 1
    right = theirs(input_ids=ids, attention_mask=padding, global_attention_mask=marked).logits
    logits = ours.logits(ours(torch.where(padding > 0, ids, -1))[0])
    close(logits[padding > 0], right[padding > 0])
    without = found.model.logits(found.model(ids[:1])[0])
    assert (without - right[:1]).abs().max() > 0.01, "the global tokens must matter"


@NO_POOLER
@torch.no_grad()
def test_big_bird_with_our_random_blocks_in_transformers_gives_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make("big_bird, masked words", num_random_blocks=2)
    theirs.save_pretrained(tmp_path / "model")
    ours = load(tmp_path / "model")
    size, length = 4, 60
    rows = torch.arange(1, length // size - 1)
    for layer, block in enumerate(theirs.bert.encoder.layer):
        spec = ours.config.layer("mixer", layer)
        assert (spec["block"], spec["random"], spec["seed"]) == (size, 2, layer)
        drawn = [Random(size, 2, layer * 6 + h, 1, length // size).table(rows).numpy() for h in range(6)]
        monkeypatch.setattr(
            block.attention.self, "_bigbird_block_rand_mask_with_head", lambda *_, drawn=drawn, **__: drawn
        )
    ids = words(2, length)
    right = theirs(input_ids=ids).logits
    assert theirs.bert.attention_type == "block_sparse"
    close(ours.model.logits(ours.model(ids)[0]), right)


@torch.no_grad()
def test_a_pooler_is_left_out_with_a_warning_that_names_it(tmp_path: Path) -> None:
    config = make("longformer, masked words").config
    torch.manual_seed(0)
    model = transformers.LongformerModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"no place for them: longformer\.pooler\.dense\.bias, longformer"):
        ours = load(tmp_path / "model")
    assert ours.config.head_transform is None
    ids = words(1, 20)
    close(ours.model(ids)[0], model(input_ids=ids).last_hidden_state)
    save(ours.model, tmp_path / "saved", format="huggingface")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(tmp_path / "saved")  # what we save has no pooler
    assert all(torch.equal(weights(again.model)[k], w) for k, w in weights(ours.model).items())


def test_a_classifier_is_refused_with_the_names_of_its_head(tmp_path: Path) -> None:
    config = make("longformer, masked words").config
    transformers.LongformerForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(BadFile, match=r"4 tensors that no rule takes: 'classifier\.dense\.bias'"):
        load(tmp_path / "model")


@torch.no_grad()
def test_led_whose_first_token_is_global_gives_their_logits_and_text(tmp_path: Path) -> None:
    theirs = make("led")
    theirs.save_pretrained(tmp_path / "model")
    found = load(tmp_path / "model")
    assert found.config.encoder is not None
    mixers = tuple({**found.config.encoder.layer("mixer", i), "tokens": 1} for i in range(3))
    values = found.config.to_dict()
    values["encoder"] = {**values["encoder"], "mixer": mixers}
    ours = Seq2Seq(ModelConfig.from_dict(values)).eval()
    ours.load_state_dict(found.model.state_dict())
    source, target = words(2, 31), words(2, 9)
    marked = torch.zeros_like(source)
    marked[:, 0] = 1
    right = theirs(input_ids=source, decoder_input_ids=target, global_attention_mask=marked).logits
    close(ours(source, target)[0], right)
    assert (found.model(source, target)[0] - right).abs().max() > 0.01, "the global token must matter"
    said = generate(ours, source.tolist(), max_new_tokens=8, decoder_start_token_id=2, eos_token_id=())
    text = theirs.generate(
        input_ids=source, global_attention_mask=marked, max_new_tokens=8, do_sample=False,
        decoder_start_token_id=2, eos_token_id=None, forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    assert [list(one.tokens) for one in said] == text[:, 1:].tolist()


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("led", {"attention_window": [4, 8]}, "attention_window=.* or one for each of 3 layers"),
        ("led", {"d_model": 50}, "d_model=50 is not a multiple of encoder_attention_heads=6"),
        ("led", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported; accepted: True"),
        ("longformer", {"attention_window": 5}, "attention_window=.* must be an even number above 0"),
        ("longformer", {"attention_window": [4, 4]}, "one for each of 3 layers"),
        ("longformer", {"pad_token_id": 0}, "pad_token_id=0 is not supported; accepted: 1"),
        ("longformer", {"attention_mode": "sliding_chunks"}, "attention_mode='sliding_chunks' is not"),
        ("big_bird", {"attention_type": "block"}, "attention_type='block' is not supported"),
        ("big_bird", {"use_bias": False}, "use_bias=False is not supported; accepted: True"),
    ],
)
def test_what_their_configs_may_not_say_is_refused(case: str, changes: dict[str, Any], message: str) -> None:
    values = make(case if case == "led" else f"{case}, masked words").config.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        read_config(values)


def test_global_tokens_and_own_seeds_cannot_be_written() -> None:
    found = read_config(make("longformer, masked words").config.to_dict())[1]
    mixers = tuple({**found.layer("mixer", i), "tokens": 1} for i in range(3))
    with pytest.raises(ValueError, match="layer 0: mixer tokens would become 0, it is 1"):
        write_config(ModelConfig.from_dict(found.to_dict() | {"mixer": mixers}), "longformer")
    found = read_config(make("big_bird, masked words").config.to_dict())[1]
    values = found.to_dict() | {"mixer": {**found.layer("mixer", 0), "seed": 7}}
    with pytest.raises(ValueError, match="layer 0: mixer seed would become 0, it is 7"):
        write_config(ModelConfig.from_dict(values), "big_bird")
