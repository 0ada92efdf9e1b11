"""Which engine a model is opened on, and what is said about it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import writehead.engines
import writehead.native.library
from writehead.config import ModelConfig
from writehead.convert.load import load, save
from writehead.convert.packed import load_packed, save_packed
from writehead.convert.tokenizer import Tokenizer
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate
from writehead.engines import open_engine
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.native.engine import NativeEngine
from writehead.native.library import library, runnable

NATIVE = pytest.mark.skipif(library()[0] is None, reason=f"no native engine: {library()[1]}")
T5 = {"name": "t5"}  # positions that the native engine has no kernels for


def small(**values: Any) -> ModelConfig:
    spec = {"name": "gqa", "heads": 4, "kv_heads": 2}
    given = {"vocab": 259, "dim": 32, "depth": 2, "mixer": spec, "position": {"name": "rotary"}} | values
    return ModelConfig(feedforward={"name": "dense", "hidden": 48, "gated": True}, **given)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Save a model over bytes whose texts wander."""

    def write(**values: Any) -> Path:
        model = Decoder(small(**values))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.5)
        save(model, tmp_path / "model", tokenizer=Tokenizer.bytes(), overwrite=True)
        return tmp_path / "model"

    return write


def tokens(engine: Any, **values: Any) -> list[int]:
    return generate(engine, [[104, 101, 108, 108, 111]], max_new_tokens=12, **values)[0].tokens


@NATIVE
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "int8", "int4"])
def test_auto_takes_the_native_engine_for_a_model_that_it_covers(dtype: str | None, saved: Any) -> None:
    path = saved()
    opened = open_engine(path, dtype=dtype, threads=1)
    assert type(opened.engine) is NativeEngine
    assert opened.dtype == (dtype or "float32")
    assert opened.why == f"{library()[1]}, {opened.dtype}, 1 thread"
    assert opened.tokenizer is not None
    if opened.dtype == "float32":
        assert tokens(opened.engine) == tokens(open_engine(path, engine="torch").engine)


@NATIVE
def test_a_packed_folder_opens_in_its_own_type(saved: Any, tmp_path: Path) -> None:
    path = saved()
    save_packed(load_packed(path, "int8").model, tmp_path / "packed", tokenizer=Tokenizer.bytes())
    opened = open_engine(tmp_path / "packed", threads=2)
    assert (opened.dtype, opened.why) == ("int8", f"{library()[1]}, int8, 2 threads")
    assert tokens(opened.engine) == tokens(open_engine(path, dtype="int8", threads=1).engine)


@NATIVE
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"engine": "torch"}, "it was asked for"),
        ({"cache_dtype": torch.float16}, "it keeps caches in float32, bfloat16 or int8, not in float16"),
    ],
)
def test_what_the_native_engine_cannot_do_goes_to_pytorch_and_is_said(
    values: dict[str, Any], why: str, saved: Any
) -> None:
    opened = open_engine(saved(), **values)
    assert type(opened.engine) is TorchEngine
    assert opened.why == f"float32; not the native one, since {why}"
    if "engine" not in values:
        with pytest.raises(ValueError, match=f"the native engine cannot be used: {why}; use engine='torch'"):
            open_engine(saved(), **values, engine="native")


@NATIVE
def test_compiling_and_the_native_engine_exclude_each_other(saved: Any) -> None:
    with pytest.raises(
        ValueError, match="the native engine cannot be used: compiling is for the PyTorch engine"
    ):
        open_engine(saved(), compile=True, engine="native")


@NATIVE
def test_a_model_that_is_not_covered_runs_on_pytorch_and_says_why(saved: Any) -> None:
    path = saved(position=T5)
    opened = open_engine(path)
    assert type(opened.engine) is TorchEngine
    assert opened.why == "float32; not the native one, since the native engine has no t5 positions"
    with pytest.raises(ValueError, match="the native engine has no t5 positions"):
        open_engine(path, engine="native")
    with pytest.raises(ValueError, match="the native engine has no t5 positions"):
        open_engine(path, dtype="int8")


def test_without_a_library_pytorch_computes_with_the_numbers_of_the_integers(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved()
    packed = load_packed(path, "int4")
    save_packed(packed.model, tmp_path / "packed")
    monkeypatch.setattr(writehead.engines, "library", lambda: (None, "there is no compiler"))
    opened = open_engine(path, dtype="int4")
    assert opened.why == "int4 computed in float32; not the native one, since there is no compiler"
    assert tokens(opened.engine) == tokens(load(tmp_path / "packed").model)
    folder = open_engine(tmp_path / "packed")
    assert tokens(folder.engine) == tokens(opened.engine)
    assert folder.dtype == "int4"
    with pytest.raises(ValueError, match="the native engine cannot be used: there is no compiler"):
        open_engine(path, engine="native")


def test_a_missing_library_is_explained_with_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writehead.native.library, "FOLDER", tmp_path)
    found, why = library.__wrapped__()
    assert found is None
    assert why == (
        f"{tmp_path} has no library for {' or '.join(runnable())}; with a C++ compiler installed, run "
        "python -m writehead.native.build"
    )


def test_a_library_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writehead.native.library, "FOLDER", tmp_path)
    (tmp_path / f"libwritehead_{runnable()[0]}.so").write_bytes(b"no library")
    found, why = library.__wrapped__()
    assert found is None
    assert "libwritehead_" in why


def test_arguments_are_checked(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown engine 'nativ'; did you mean 'native'"):
        open_engine(saved(), engine="nativ")
    with pytest.raises(ValueError, match="unknown dtype 'int2'"):
        open_engine(saved(), dtype="int2")
    spec = {"name": "bidirectional", "heads": 4}
    save(Encoder(small(kind="encoder", mixer=spec)), tmp_path / "encoder")
    with pytest.raises(ValueError, match="Encoder cannot decode"):
        open_engine(tmp_path / "encoder", engine="torch")
