"""Reformer folders of transformers: the same logits of whole sequences, and back; hashes come from a seed."""

from pathlib import Path

import pytest
import torch
import transformers
from their_models import WHOLE, make
from transformers.models.reformer import modeling_reformer

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile
from writehead.convert.huggingface import read_config, write_config
from writehead.convert.load import load, save
from writehead.model.decoder import Decoder

VALUES = make(WHOLE[0]).config.to_dict()


@pytest.fixture
def wide_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rotations in float64 are those in float32, not others."""
    draw = torch.randn

    def drawn(*shape, dtype=torch.float32, **rest):
        return draw(*shape, dtype=torch.float32, **rest).to(dtype)

    monkeypatch.setattr(modeling_reformer.torch, "randn", drawn)


def pair(case, folder, **changes):
    theirs = make(case, **changes)
    theirs.save_pretrained(folder)
    ours = load(folder, dtype=torch.float64)
    return theirs.double(), ours.model


def logits(theirs, ids, **more):
    with torch.no_grad():
        return theirs(input_ids=ids, **more).logits + theirs.lm_head.bias


@pytest.mark.parametrize("length", [5, 8, 21, 64])
@pytest.mark.parametrize("case", WHOLE)
def test_whole_sequences_give_their_logits(case, length, tmp_path, wide_draws):
    theirs, ours = pair(case, tmp_path / "model")
    ids = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))
    right = logits(theirs, ids)
    with torch.no_grad():
        found = ours(ids)[0]
    assert right.abs().max() > 0.1
    # their self-mask of -1e5 takes the place of an empty row, but swallows the score's digits there
    assert float((found - right).abs().max()) < 1e-6


def test_in_float32_they_differ_by_their_self_mask_only(tmp_path):
    theirs = make(WHOLE[0])
    theirs.save_pretrained(tmp_path / "model")
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        away = (load(tmp_path / "model").model(ids)[0] - logits(theirs, ids)).abs().amax(-1)
    # a score of -1e5 has steps of 1/128, so a token that reads itself alone is weighed wrongly by up to as much
    assert float(away.max()) < 2e-2
    assert float(away.median()) < 1e-4


def test_padding_and_chunks_without_a_common_divisor_are_as_theirs(tmp_path, wide_draws):
    theirs, ours = pair(WHOLE[0], tmp_path / "model", local_attn_chunk_length=12, lsh_attn_chunk_length=4)
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    right = logits(theirs, ids, attention_mask=mask)
    with torch.no_grad():
        found = ours(torch.where(mask == 1, ids, -1))[0]
    assert float((found - right)[mask == 1].abs().max()) < 1e-6
    short = ids[:1, :17]
    right = logits(theirs, short)
    with torch.no_grad():
        padded = torch.cat([short, torch.full((1, 7), -1)], 1)
        assert float((ours(padded)[0][:, :17] - right).abs().max()) < 1e-6


def test_gradients_are_those_of_their_reversible_layers(tmp_path, wide_draws):
    theirs, ours = pair(
        WHOLE[0], tmp_path / "model", hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0
    )
    ids = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(2))
    weight = torch.randn(2, 64, 97, dtype=torch.float64)
    (theirs.train()(input_ids=ids).logits * weight).sum().backward()
    (ours.train()(ids)[0] * weight).sum().backward()
    rows = {
        "embedding.table": "reformer.embeddings.word_embeddings.weight",
        "embedding.output": "lm_head.decoder.weight",
        "stack.blocks.1.mixer.qk.weight": "reformer.encoder.layers.1.attention.self_attention.query_key.weight",
        "stack.blocks.0.mixer.out.weight": "reformer.encoder.layers.0.attention.output.dense.weight",
        "stack.blocks.2.feedforward.outer.bias": "reformer.encoder.layers.2.feed_forward.output.dense.bias",
    }
    mine, them = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for a, b in rows.items():
        right = them[b].grad
        assert float((mine[a].grad - right).abs().max() / right.abs().max()) < 1e-6, a


def test_a_seed_is_found_again_and_transformers_gives_our_logits(tmp_path, wide_draws):
    _, ours = pair(WHOLE[0], tmp_path / "model", hash_seed=None)
    save(ours.float(), tmp_path / "ours", format="huggingface", model_type="reformer")
    back, report = transformers.ReformerModelWithLMHead.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert back.config.hash_seed == 0  # where there was none ours come from 0
    ids = torch.randint(97, (1, 32), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert float((ours.double()(ids)[0] - logits(back.double(), ids)).abs().max()) < 1e-6
    assert torch.equal(load(tmp_path / "ours").model(ids)[0], ours.float()(ids)[0])


def test_other_modes_take_the_weights_and_decode(tmp_path):
    make(WHOLE[0]).save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    with pytest.raises(ValueError, match='mode="paper" cannot decode'):
        loaded.model.init_state(1)
    mixers = tuple(
        {**spec, "mode": "multiset"} if spec["name"] == "reformer" else spec for spec in loaded.config.mixer
    )
    values = loaded.config.to_dict() | {"mixer": list(mixers)}
    model = Decoder(ModelConfig.from_dict(values)).eval()
    model.load_state_dict(loaded.model.state_dict())
    ids = torch.randint(97, (1, 30))
    with torch.no_grad():
        whole, state, steps = model(ids)[0], model.init_state(1), []
        for piece in ids.split(1, 1):
            step, state = model.step(piece, state)
            steps.append(step)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


def test_rotations_that_no_seed_gives_are_not_dropped(tmp_path):
    make(WHOLE[0]).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model").model
    model.stack.blocks[2].mixer.hashes.draw(7)
    with pytest.raises(ValueError, match=r"transformers stores no rotations.*no seed from 0 to 1023 gives"):
        save(model, tmp_path / "ours", format="huggingface")
    assert not Path(tmp_path / "ours").exists()
    save(model, tmp_path / "ours")
    ids = torch.randint(97, (1, 20))
    assert torch.equal(load(tmp_path / "ours").model(ids)[0], model(ids)[0])
    for layer in (1, 2):
        model.stack.blocks[layer].mixer.hashes.draw(7)
    save(model, tmp_path / "seven", format="huggingface")
    assert load(tmp_path / "seven").config == load(tmp_path / "ours").config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": False}, "is_decoder=false is not supported; accepted: true"),
        (
            {"attn_layers": ["lsh", "globl"]},
            r"attn_layers=\['lsh', 'globl'\] must be a list of 'lsh' and 'local'",
        ),
        ({"lsh_num_chunks_before": 2}, "lsh_num_chunks_before=2 is not supported; accepted: 1"),
        ({"local_num_chunks_after": 1}, "local_num_chunks_after=1 is not supported; accepted: 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported; accepted: False"),
        ({"num_buckets": [8, 0]}, r"num_buckets=\[8, 0\] must be an even whole number, or several"),
        ({"axial_pos_shape": [4, 4, 4]}, r"axial_pos_shape=\[4, 4, 4\] must be two whole numbers"),
        ({"axial_pos_embds_dim": [16, 16]}, r"axial_pos_embds_dim=\[16, 16\] must be 48 together"),
        ({"hash_seed": -1}, "hash_seed=-1 must be a whole number from 0"),
    ],
)
def test_what_we_cannot_honour_is_refused_with_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config({**VALUES, **changes})


@pytest.mark.parametrize(
    ("context", "buckets"), [(64, 16), (4096, [32, 32]), (512, 16), (1 << 19, [256, 512])]
)
def test_buckets_left_open_are_those_that_transformers_chooses(context, buckets):
    chunk = {64: 8, 4096: 8, 512: 64, 1 << 19: 8}[context]
    values = {
        **VALUES,
        "num_buckets": None,
        "max_position_embeddings": context,
        "lsh_attn_chunk_length": chunk,
    }
    _, config = read_config(values)
    assert config.layer("mixer", 1)["buckets"] == buckets
    layer = modeling_reformer.LSHSelfAttention(
        transformers.ReformerConfig(
            **{
                key: values[key]
                for key in ("num_buckets", "max_position_embeddings", "lsh_attn_chunk_length", "attn_layers")
            }
        )
    )
    layer._set_num_buckets(context)
    assert layer.num_buckets == buckets


def test_too_many_rotations_are_refused_before_they_are_drawn(tmp_path):
    make(WHOLE[0]).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model/config.json").read_text()
    (tmp_path / "model/config.json").write_text(text.replace('"num_hashes": 3', '"num_hashes": 2000000000'))
    with pytest.raises(BadFile, match=r"rounds=2000000000 of 6 buckets need .* random values; at most"):
        load(tmp_path / "model")


def test_a_model_that_is_no_reformer_of_theirs_says_what_differs():
    config = ModelConfig(
        vocab=11, dim=16, depth=2, mixer={"name": "reformer", "heads": 2}, stack={"name": "reversible"}
    )
    with pytest.raises(ValueError, match="tie_embeddings would become False, it is True"):
        write_config(config, "reformer")
