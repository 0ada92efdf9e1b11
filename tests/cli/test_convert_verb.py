"""`writehead convert` and what `writehead generate` makes of its folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from writehead.cli import app
from writehead.config import ModelConfig
from writehead.convert.load import load, save
from writehead.convert.packed import load_packed
from writehead.convert.tokenizer import Tokenizer
from writehead.model.decoder import Decoder
from writehead.model.parts import weights
from writehead.native.library import library

NATIVE = pytest.mark.skipif(library()[0] is None, reason=f"no native engine: {library()[1]}")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = ModelConfig(
        vocab=259,
        dim=32,
        depth=2,
        mixer={"name": "mqa", "heads": 2},
        position={"name": "rotary"},
        feedforward={"name": "dense", "hidden": 48, "gated": True, "activation": "silu"},
        stack={"name": "residual", "norm": "rms"},
        max_context=64,
    )
    save(Decoder(config), tmp_path / "model", tokenizer=Tokenizer.bytes())
    return tmp_path / "model"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: Any) -> Ran:
        with pytest.raises(SystemExit) as ended:
            app([str(arg) for arg in args])
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [("int8", "9 matrices in int8"), ("int4", "1 matrices in int8, 8 matrices in int4")],
)
def test_integers_are_written_packed_with_the_tokenizer(
    dtype: str, kinds: str, run: Run, model: Path, tmp_path: Path
) -> None:
    ran = run("convert", model, tmp_path / "out", "--dtype", dtype)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{tmp_path / 'out'}: packed format, {kinds}, ")
    assert ran.out.count("\n") == 1
    found = load_packed(tmp_path / "out")
    assert found.model.format == dtype
    assert found.tokenizer is not None


@pytest.mark.parametrize("format", ["writehead", "huggingface", "packed"])
def test_floats_are_written_for_every_tool(format: str, run: Run, model: Path, tmp_path: Path) -> None:
    ran = run("convert", model, tmp_path / "out", "--dtype", "bfloat16", "--format", format)
    assert (ran.code, ran.err) == (0, "")
    before, after = (weights(load(path).model) for path in (model, tmp_path / "out"))
    for name, weight in before.items():  # packed models keep norms in float32
        exact = format == "packed" and weight.dim() == 1
        assert torch.equal(after[name], weight if exact else weight.bfloat16().float()), name
    assert ("model_type" in json.loads((tmp_path / "out" / "config.json").read_text())) == (
        format == "huggingface"
    )


def test_a_folder_is_replaced_only_when_asked(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("convert", model, tmp_path / "out").code == 0
    again = run("convert", model, tmp_path / "out", "--dtype", "int8")
    assert again.code == 1
    assert "exists; choose another name or allow overwriting" in again.err
    assert run("convert", model, tmp_path / "out", "--dtype", "int8", "--overwrite").code == 0
    assert load_packed(tmp_path / "out").model.format == "int8"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int5"], "unknown --dtype 'int5'"),
        (["--format", "gguf"], "unknown --format 'gguf' (accepted: huggingface, packed, writehead)"),
        (["--dtype", "int8", "--format", "huggingface"], "--format huggingface holds floats; int8 needs --format packed"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_one_line_and_a_code(
    flags: list[str], message: str, run: Run, model: Path, tmp_path: Path
) -> None:
    ran = run("convert", model, tmp_path / "out", *flags)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@NATIVE
def test_a_converted_folder_decodes_in_its_type_on_the_native_engine(
    run: Run, model: Path, tmp_path: Path
) -> None:
    run("convert", model, tmp_path / "out", "--dtype", "int8")
    flags = ("--model", tmp_path / "out", "--threads", 1, "--max-new-tokens", 8)
    ran = run("generate", "hello", *flags)
    assert ran.code == 0
    why = f"{library()[1]}, int8, 1 thread, without PyTorch"
    assert ran.err.endswith(f"; engine native ({why})\n")
    said = json.loads(run("generate", "hello", *flags, "--json").out)
    assert (said["engine"], said["dtype"]) == ("native", "int8")
    assert said["engine_why"] == why
    assert said["generations"][0]["text"] + "\n" == ran.out
    wrong = run("generate", "hello", *flags, "--dtype", "int4")
    assert wrong.code == 1
    assert "is saved in int8, not in int4" in wrong.err


@NATIVE
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_caches_of_every_type_serve_the_native_engine(cache: str, run: Run, model: Path) -> None:
    ran = run(
        "generate", "hello", "--model", model, "--threads", 1, "--max-new-tokens", 4, "--cache-dtype", cache
    )
    assert ran.code == 0
    assert f"engine native ({library()[1]}, float32, 1 thread)" in ran.err


@NATIVE
def test_an_engine_that_cannot_be_had_is_one_line(run: Run, model: Path) -> None:
    ran = run("generate", "x", "--model", model, "--engine", "native", "--cache-dtype", "float16")
    assert ran.code == 1
    assert ran.err == (
        "error: the native engine cannot be used: it keeps caches in float32, bfloat16 or int8, not in float16; "
        "use engine='torch'\n"
    )
