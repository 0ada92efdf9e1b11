"""What we save, transformers loads; what we load again is the same to the bit; shards, copies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from their_models import CASES, ENCODERS, make

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile
from writehead.convert.huggingface import read_config, write_config
from writehead.convert.load import load, save
from writehead.model.decoder import Decoder
from writehead.model.parts import weights

pytestmark = pytest.mark.filterwarnings("ignore:left out, since the model has no place:UserWarning")
TOLERANCE = 1e-5  # largest difference of a logit, float32

CLASSES = dict.fromkeys(("t5", "led"), transformers.AutoModelForSeq2SeqLM)


def logits_of_theirs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        given = model(**inputs)
    return given.logits if "logits" in given else given.last_hidden_state


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, others = weights(a), weights(b)
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("case", CASES)
def test_saved_models_load_in_transformers_and_here(case: str, tmp_path: Path) -> None:
    first = make(case)
    first.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    kind = first.config.model_type
    save(ours.model, tmp_path / "saved", format="huggingface", model_type=kind)
    loader = type(first) if case in ENCODERS else CLASSES.get(kind, transformers.AutoModelForCausalLM)
    second, report = loader.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not [key for key in report["missing_keys"] if ".pooler." not in key]  # guessing words needs none
    assert not report["unexpected_keys"]
    assert second.config.model_type == kind
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(1))  # 1 is padding to some
    assert (logits_of_theirs(first, ids) - logits_of_theirs(second, ids)).abs().max() < TOLERANCE
    again = load(tmp_path / "saved")
    assert again.config == ours.config
    assert same_weights(again.model, ours.model)


@pytest.mark.parametrize(
    "case", ["llama", "qwen2, window in some layers", "gpt2", "t5", "t5, version 1.1", "falcon, alibi"]
)
def test_our_own_format_keeps_every_bit(case: str, tmp_path: Path) -> None:
    make(case).save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save(ours.model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["writehead"] == 1
    assert again.config == ours.config
    assert same_weights(again.model, ours.model)


@pytest.mark.parametrize("case", ["llama, untied, all biases", "t5"])
def test_shards_are_read_as_one_checkpoint(case: str, tmp_path: Path) -> None:
    model = make(case)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert same_weights(load(tmp_path / "shards").model, load(tmp_path / "whole").model)


def test_a_gpt2_without_the_prefix_of_its_keys_is_the_same_model(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints name their tensors so, and hold causal masks besides."""
    make("gpt2").save_pretrained(tmp_path / "model")
    whole = load(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    save_file(tensors, file)
    assert same_weights(load(tmp_path / "model").model, whole.model)


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_of_the_embedding_must_equal_it(changed: bool, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "model")
    whole = load(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + float(changed)
    save_file(tensors, file)
    if changed:
        with pytest.raises(BadFile, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
            load(tmp_path / "model")
    else:
        assert same_weights(load(tmp_path / "model").model, whole.model)


def test_an_embedding_under_the_name_of_its_copy_is_found(tmp_path: Path) -> None:
    make("t5").save_pretrained(tmp_path / "model")
    whole = load(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file)
    assert same_weights(load(tmp_path / "model").model, whole.model)


def test_a_t5_that_says_it_is_tied_but_is_not_keeps_its_output_matrix(tmp_path: Path) -> None:
    """Transformers 5 writes tie_word_embeddings=true for every T5; the scale tells the versions apart."""
    model = make("t5, version 1.1")
    model.save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert values["tie_word_embeddings"] is True
    assert values["scale_decoder_outputs"] is False
    config = load(tmp_path / "model").config
    assert (config.tie_embeddings, config.logit_scale) == (False, 1.0)
    old = {key: value for key, value in values.items() if key != "scale_decoder_outputs"}
    _, config = read_config(old | {"tie_word_embeddings": False})
    assert (config.tie_embeddings, config.logit_scale) == (False, 1.0)


def test_older_spellings_of_rotary_settings_mean_the_same() -> None:
    _, new = read_config(make("llama, llama3 scaling").config.to_dict())
    values = make("llama, llama3 scaling").config.to_dict()
    settings = dict(values.pop("rope_parameters"))
    theta, kind = settings.pop("rope_theta"), settings.pop("rope_type")
    _, old = read_config(values | {"rope_theta": theta, "rope_scaling": settings | {"type": kind}})
    assert old == new
    assert old.position["base"] == 5000.0


def test_a_model_of_our_own_is_written_as_the_first_family_that_can_hold_it() -> None:
    config = ModelConfig(
        vocab=97, dim=48, depth=2, mixer={"name": "mqa", "heads": 6},
        feedforward={"name": "dense", "activation": "silu", "gated": True, "hidden": 80},
    )  # fmt: skip
    family, values = write_config(config)
    assert (family.model_type, values["num_key_value_heads"], values["head_dim"]) == ("llama", 1, 8)


def test_a_model_that_no_family_can_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab=97, dim=48, depth=2, mixer={"name": "sink_mqa", "heads": 6},
        feedforward={"name": "dense", "activation": "silu", "gated": True, "hidden": 80},
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"llama: layer 0: mixer pattern would become .*causal.*, it is .*leading"
    ):
        save(Decoder(config), tmp_path / "model", format="huggingface")
    with pytest.raises(ValueError, match="gpt2: none of the model's parts has the argument 'max_context'"):
        save(Decoder(config), tmp_path / "model", format="huggingface", model_type="gpt2")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_written_and_read_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    make("gemma, one write-head").save_pretrained(tmp_path / "theirs")
    half = load(tmp_path / "theirs", dtype=dtype)
    save(half.model, tmp_path / "saved", format="huggingface", model_type="gemma")
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved/model.safetensors").values()} == {dtype}
    assert same_weights(load(tmp_path / "saved", dtype=dtype).model, half.model)
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert second.dtype == dtype
