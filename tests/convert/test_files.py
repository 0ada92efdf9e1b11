"""Model folders: what is written is read back, a bad file is named, and nothing half-written is left."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from writehead.convert.errors import BadFile
from writehead.convert.files import DTYPES, read_tensors, write_tensors
from writehead.convert.header import ITEMSIZES
from writehead.convert.strict_json import read_json
from writehead.convert.writing import whole_or_nothing, write_json

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor([[True, False]]),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_single_file_is_read_back_and_by_the_safetensors_package_too(tmp_path):
    files = write_tensors(tmp_path, WEIGHTS, metadata={"by": "test"})
    assert [file.name for file in files] == ["model.safetensors"] == names_in(tmp_path)
    found = read_tensors(tmp_path)
    assert_same({name: found[name] for name in WEIGHTS}, WEIGHTS)
    assert set(found) == set(WEIGHTS)
    assert found.metadata == {"format": "pt", "by": "test"}
    assert found.nbytes == 24 + 4 + 2 + 8
    assert_same({name: load_file(files[0])[name] for name in WEIGHTS}, WEIGHTS)


def test_shards_follow_the_limit_and_are_read_back_in_order(tmp_path):
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}
    tensors["large"] = torch.ones(100)
    write_tensors(tmp_path, tensors, max_shard_bytes=80)
    shards = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert names_in(tmp_path) == [*shards, "model.safetensors.index.json"]
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 600}
    assert [index["weight_map"][name] for name in tensors] == [shards[i] for i in (0, 0, 1, 1, 2, 3)]
    assert_same(read_tensors(tmp_path), tensors)
    assert_same(read_tensors(tmp_path / "model.safetensors.index.json"), tensors)


def test_lazily_read_tensors_can_be_written_again(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_tensors(tmp_path / "one", WEIGHTS)
    write_tensors(tmp_path / "two", read_tensors(tmp_path / "one"), max_shard_bytes=16)
    found = read_tensors(tmp_path / "two")
    assert_same({name: found[name] for name in WEIGHTS}, WEIGHTS)


def test_membership_and_entries_read_no_data(tmp_path):
    write_tensors(tmp_path, WEIGHTS)
    found = read_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "a" in found
    assert "z" not in found
    assert found.entry("a").shape == (2, 3)
    with pytest.raises(BadFile, match=r"model.safetensors: tensor 'a' cannot be read"):
        found["a"]


def test_views_of_one_fused_tensor_are_written_as_their_own_values(tmp_path):
    q, k = torch.arange(12.0).reshape(4, 3).split(2)
    turned = torch.arange(6.0).reshape(2, 3).t()
    write_tensors(tmp_path, {"q": q, "k": k, "turned": turned})
    found = read_tensors(tmp_path)
    assert_same({name: found[name] for name in ("q", "k", "turned")}, {"q": q, "k": k, "turned": turned})


def test_tied_tensors_are_named(tmp_path):
    weight = torch.ones(2)
    with pytest.raises(ValueError, match=r"embed and head share memory; write one of them"):
        write_tensors(tmp_path, {"embed": weight, "head": weight})
    with pytest.raises(ValueError, match=r"model.safetensors cannot be written"):
        write_tensors(tmp_path, {"whole": torch.arange(4.0), **dict(zip("xy", overlapping(), strict=True))})
    assert names_in(tmp_path) == []


def overlapping():
    base = torch.arange(6.0)
    return base[:4], base[2:]


def test_writing_needs_tensors_a_limit_and_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there are no tensors to write"):
        write_tensors(tmp_path, {})
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        write_tensors(tmp_path, WEIGHTS, max_shard_bytes=0)
    write_tensors(tmp_path, WEIGHTS)
    with pytest.raises(ValueError, match=r"already holds model\.safetensors; write into a folder without"):
        write_tensors(tmp_path, WEIGHTS)


GOOD_ENTRY = f32([2], 0, 8)
BROKEN = {
    "nothing": (b"", "the header claims 0 bytes, the file has 0: truncated or not safetensors"),
    "a huge header": (
        safetensors_bytes({}, length=2**62),
        rf"header claims {2**62} bytes, the file has \d+: truncated",
    ),
    "text": (b"\x02\0\0\0\0\0\0\0[]", r"the header does not begin with '\{': no safetensors file"),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}'), r"the header is not UTF-8 text \(byte 2\)"),
    "no JSON": (safetensors_bytes(b'{"a": '), "the header is not JSON: 'Expecting value"),
    "deep JSON": (
        safetensors_bytes(b'{"a":' + b"[" * 200_000),
        "the header nests lists or objects too deeply",
    ),
    "a huge number": (
        safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"),
        "the header is not JSON: 'Exceeds the limit",
    ),
    "not a number": (safetensors_bytes(b'{"a": NaN}'), "the header holds NaN, which is not JSON"),
    "a name twice": (
        safetensors_bytes(b'{"a": {"dtype":"U8","shape":[],"data_offsets":[0,1]}, "a": 0}', b"x"),
        "the header gives the key 'a' twice",
    ),
    "bad metadata": (
        safetensors_bytes({"__metadata__": {"a": 1}}),
        r"__metadata__ is .*expected an object of strings",
    ),
    "no entry": (
        safetensors_bytes({"a": [1]}),
        r"tensor 'a' is \[1\]; expected dtype, shape and data_offsets",
    ),
    "a further field": (
        safetensors_bytes({"a": {**GOOD_ENTRY, "x": 1}}),
        "expected dtype, shape and data_offsets",
    ),
    "a bad dtype": (
        safetensors_bytes({"a": f32([2], 0, 8, "F31")}),
        "tensor 'a' has dtype 'F31'; accepted: F64, F32",
    ),
    "a negative size": (
        safetensors_bytes({"a": f32([-2], 0, 8)}),
        r"tensor 'a' has shape \[-2\]; expected at most 64",
    ),
    "a boolean size": (
        safetensors_bytes({"a": f32([True], 0, 4)}),
        r"tensor 'a' has shape \[True\]; expected at most",
    ),
    "a high rank": (safetensors_bytes({"a": f32([1] * 65, 0, 4)}), "has shape .*; expected at most 64 sizes"),
    "reversed offsets": (
        safetensors_bytes({"a": f32([2], 8, 0)}),
        r"has data_offsets \[8, 0\]; expected \[begin, end\]",
    ),
    "an overflowing shape": (
        safetensors_bytes({"a": f32([2**62, 4], 0, 8)}),
        rf"tensor 'a': F32 .* needs {2**66} bytes, data_offsets give 8",
    ),
    "an overlap": (
        safetensors_bytes({"a": GOOD_ENTRY, "b": f32([2], 4, 12)}, bytes(12)),
        "tensor 'b' begins at byte 4 and overlaps its neighbour; expected 8",
    ),
    "a gap": (
        safetensors_bytes({"a": GOOD_ENTRY, "b": f32([2], 12, 20)}, bytes(20)),
        "tensor 'b' begins at byte 12 and leaves a gap before it; expected 8",
    ),
    "truncated data": (
        safetensors_bytes({"a": GOOD_ENTRY}, bytes(7)),
        "the tensors end at byte 8 of the data, which has 7: truncated",
    ),
    "bytes too many": (
        safetensors_bytes({"a": GOOD_ENTRY}, bytes(9)),
        "the tensors end at byte 8 of the data, which has 9: bytes that belong to no tensor",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_safetensors_file_is_refused_with_the_reason(kind, tmp_path):
    data, message = BROKEN[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=message) as caught:
        read_tensors(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_header_over_the_cap_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("writehead.convert.header.MAX_HEADER_BYTES", 10)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": GOOD_ENTRY}, bytes(8)))
    with pytest.raises(BadFile, match=r"the header claims \d+ bytes; at most 10 are read"):
        read_tensors(tmp_path)


def write_shards(folder: Path, weight_map: object, **shards: dict[str, torch.Tensor]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE, TWO = {"a": torch.ones(1)}, {"b": torch.ones(1)}
BAD_INDEXES = {
    "no map": (None, r"weight_map is None; expected an object"),
    "a path upwards": (
        {"a": "../x.safetensors"},
        r"'a' is in '../x.safetensors'; expected a safetensors file of this",
    ),
    "an absolute path": ({"a": "/etc/x.safetensors"}, r"expected a safetensors file of this folder"),
    "another kind of file": ({"a": "x.bin"}, r"'a' is in 'x.bin'; expected a safetensors file"),
    "no name": ({"a": 3}, r"'a' is in 3; expected a safetensors file"),
    "a missing shard": ({"a": "zero.safetensors"}, r"zero.safetensors: no such file"),
    "a missing tensor": (
        {"a": "x.safetensors", "c": "x.safetensors"},
        r"'c' is not in x.safetensors \(1 such",
    ),
    "an unlisted tensor": (
        {"a": "x.safetensors", "z": "y.safetensors"},
        r"'b' is in y.safetensors; the index says No",
    ),
    "the wrong shard": (
        {"a": "y.safetensors", "b": "x.safetensors"},
        r"'b' is in y.safetensors; the index says 'x.safetensors'",
    ),
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_an_index_that_disagrees_with_its_shards_is_refused(kind, tmp_path):
    weight_map, message = BAD_INDEXES[kind]
    write_shards(tmp_path, weight_map, x=ONE, y=TWO)
    with pytest.raises(BadFile, match=message):
        read_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_shards(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y={**TWO, **ONE})
    with pytest.raises(BadFile, match=r"'a' is in both x.safetensors and y.safetensors"):
        read_tensors(tmp_path)


def test_a_folder_needs_exactly_one_of_the_two_names(tmp_path):
    with pytest.raises(BadFile, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        read_tensors(tmp_path)
    write_shards(tmp_path, {"a": "x.safetensors"}, x=ONE, model=TWO)
    with pytest.raises(BadFile, match=r"holds both .*; give the path of the one to read"):
        read_tensors(tmp_path)
    assert list(read_tensors(tmp_path / "model.safetensors")) == ["b"]


BAD_JSON = {
    "a list": (b"[1]", "the file holds a list; expected one JSON object"),
    "a key twice": (b'{"x": {"a": 1, "a": 2}}', "the file gives the key 'a' twice in one object"),
    "no text": (b"\xff\xfe{\0}\0", r"the file is not UTF-8 text \(byte 0\)"),
    "half a file": (b'{"a": 1', "the file is not JSON: "),
    "infinity": (
        b'{"a": -Infinity}',
        "the file holds -Infinity, which is not JSON; expected a finite number",
    ),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused_with_the_reason(kind, tmp_path):
    data, message = BAD_JSON[kind]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(BadFile, match=message):
        read_json(tmp_path / "config.json")


def test_a_large_or_missing_json_file_is_refused_unread(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(BadFile, match="is 8 bytes; a JSON file here may have at most 7"):
        read_json(tmp_path / "config.json", max_bytes=7)
    with pytest.raises(BadFile, match="no such file"):
        read_json(tmp_path / "other.json")
    with pytest.raises(BadFile, match="is not a file name"):
        read_json("a\0b")


def test_json_is_read_back_and_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"name": "naïve", "rate": 0.1, "list": [1, None, True]})
    assert read_json(path) == {"name": "naïve", "rate": 0.1, "list": [1, None, True]}
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(path, {"rate": float("nan")})
    assert read_json(path)["rate"] == 0.1
    assert names_in(tmp_path) == ["config.json"]


def test_a_folder_appears_whole_under_its_name(tmp_path):
    with whole_or_nothing(tmp_path / "model") as folder:
        write_json(folder / "config.json", {"a": 1})
        assert not (tmp_path / "model").exists()
    assert names_in(tmp_path) == ["model"]
    assert read_json(tmp_path / "model" / "config.json") == {"a": 1}
    assert (tmp_path / "model").stat().st_mode & 0o777 == folder_mode(tmp_path)


def folder_mode(folder: Path) -> int:
    (folder / "plain").mkdir()
    return (folder / "plain").stat().st_mode & 0o777


def replace_folder(target: Path, error: type[BaseException] | None = None) -> None:
    with whole_or_nothing(target, overwrite=True) as folder:
        write_json(folder / "config.json", {"version": 2})
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing_new_and_the_old_folder_untouched(error, tmp_path):
    with whole_or_nothing(tmp_path / "old") as folder:
        write_json(folder / "config.json", {"version": 1})
    for target in ("new", "old"):
        with pytest.raises(error):
            replace_folder(tmp_path / target, error)
    assert names_in(tmp_path) == ["old"]
    assert read_json(tmp_path / "old" / "config.json") == {"version": 1}


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_model(tmp_path):
    target = tmp_path / "model"
    with whole_or_nothing(target) as folder:
        write_json(folder / "config.json", {"version": 1})
        write_json(folder / "stale.json", {})
    with pytest.raises(ValueError, match="model exists; choose another name or allow overwriting"):
        whole_or_nothing(target).__enter__()
    replace_folder(target)
    assert names_in(target) == ["config.json"]
    assert read_json(target / "config.json") == {"version": 2}
    (target / "config.json").rename(target / "diary.txt")
    with pytest.raises(ValueError, match=r"is not a model folder \(no config.json\); it is not overwritten"):
        whole_or_nothing(target, overwrite=True).__enter__()
    with pytest.raises(ValueError, match="does not exist; make it first"):
        whole_or_nothing(tmp_path / "no" / "model").__enter__()
    assert names_in(tmp_path) == ["model"]


def test_a_swap_that_fails_half_way_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with whole_or_nothing(target) as folder:
        write_json(folder / "config.json", {"version": 1})
    rename = Path.rename

    def fails_for_the_new(self, to):
        if self.name.endswith(".partial"):
            raise OSError("no space")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="no space"):
        replace_folder(target)
    assert names_in(tmp_path) == ["model"]
    assert read_json(target / "config.json") == {"version": 1}


def test_every_type_of_a_header_is_as_wide_as_its_tensors() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEMSIZES
