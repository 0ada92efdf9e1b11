"""One text without PyTorch: it is what the native engine gives, or the folder is left to others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_native import built, single

from writehead.cli import app
from writehead.convert.errors import BadFile
from writehead.convert.packed import save_packed
from writehead.convert.packed_map import CONFIG, FILE, outline_in, read_packed_header
from writehead.convert.tokenizer import Tokenizer
from writehead.decode import limits
from writehead.decode.generate import generate
from writehead.decode.options import Options
from writehead.engines import open_engine
from writehead.native.covers import cover
from writehead.native.engine import NativeEngine
from writehead.native.library import library
from writehead.native.outline import Outline
from writehead.native.weights import pack_model
from writehead.solo import Solo, SoloStream, open_solo, plain

pytestmark = pytest.mark.skipif(library()[0] is None, reason=f"no native engine here: {library()[1]}")
BYTES: dict[str, Any] = {"vocab": 259, "max_context": 400}
WINDOWS = (
    {"name": "mqa", "heads": 4},
    {"name": "local_mqa", "heads": 4, "pattern": {"name": "window", "window": 3}},
    {"name": "mha", "heads": 4, "pattern": {"name": "window", "window": 20}},
)
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "untied": {"tie_embeddings": False, "head_bias": True},
    "scaled rotation": {
        "position": {"name": "rotary", "scaling": {"name": "yarn", "factor": 4.0, "original_context": 16}}
    },
    "pairs": {"position": {"name": "rotary", "rotary_dim": 2, "pairs": "interleaved"}},
    "ALiBi": {"position": {"name": "alibi"}, "mixer": {"name": "mqa", "heads": 4}},
    "learned": {
        "position": {"name": "learned", "max_context": 400},
        "stack": {"name": "residual", "norm": "layer"},
    },
    "no positions": {"position": {"name": "none"}},
    "windows in turns": {"depth": 5, "mixer": WINDOWS},
    "sinks": {
        "mixer": {
            "name": "sink_mqa",
            "heads": 4,
            "pattern": {
                "name": "and",
                "a": {"name": "causal"},
                "b": {
                    "name": "or",
                    "a": {"name": "window", "window": 4},
                    "b": {"name": "leading", "count": 2},
                },
            },
        }
    },
    "biases": {"mixer": {"name": "mha", "heads": 3, "head_dim": 10, "bias": "all"}},
    "parallel": {"stack": {"name": "residual", "order": "parallel", "one_norm": True}},
    "scales": {"embed_scale": 2, "logit_scale": 0.3, "embed_norm": True},
    "gated": {
        "feedforward": {"name": "dense", "hidden": 23, "gated": True, "activation": "silu", "bias": True}
    },
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Save a packed model over bytes."""

    def folder(format: str = "float32", **values: Any) -> Path:
        path = tmp_path / "packed"
        packed = pack_model(built(4, **BYTES | values), format)
        save_packed(packed, path, tokenizer=Tokenizer.bytes(), overwrite=True)
        return path

    return folder


def opened(folder: Path, **values: Any) -> Solo:
    found = open_solo(folder, threads=2, **values)
    assert found is not None
    return found


def play(solo: Solo, text: str, **values: Any) -> SoloStream:
    assert solo.tokenizer is not None
    run = SoloStream(solo, solo.tokenizer.encode(text), Options(**values))
    assert "".join(event.text for event in run) == run.generations[0].text
    return run


def expected(folder: Path, text: str, **values: Any) -> Any:
    there = open_engine(folder, engine="native", threads=2)
    assert there.tokenizer is not None
    return generate(there.engine, [there.tokenizer.encode(text)], tokenizer=there.tokenizer, **values)


def same(run: SoloStream, right: Any) -> None:
    """Raise unless a text and what is said of it are those of `generate`."""
    (ours,), (theirs,) = run.generations, right.generations
    assert (ours.tokens, ours.text, ours.finish_reason) == (theirs.tokens, theirs.text, theirs.finish_reason)
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    for name in ("engine", "prefill_tokens", "decode_tokens", "decode_steps", "weight_bytes"):
        assert getattr(run.timings, name) == getattr(right.timings, name), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_is_that_of_the_native_engine(kind: str, make: Make) -> None:
    folder = make(**MODELS[kind])
    text = "one row of a decoder " * 5  # longer than windows and their pieces
    same(play(opened(folder), text, max_new_tokens=40), expected(folder, text, max_new_tokens=40))
    drawn: dict[str, Any] = {"temperature": 4.0, "seed": 2, "max_new_tokens": 40}
    run = play(opened(folder), "a", **drawn)
    same(run, expected(folder, "a", **drawn))
    assert len(set(run.generations[0].tokens)) > 5, "the text should wander"


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_every_format_is_read_where_it_lies(format: str, make: Make) -> None:
    folder = make(format, tie_embeddings=False)
    assert opened(folder).dtype == format
    same(play(opened(folder), "hello", max_new_tokens=40), expected(folder, "hello", max_new_tokens=40))


def test_a_prompt_longer_than_a_call_goes_in_pieces(make: Make) -> None:
    folder, text = make(max_context=2000), "many tokens " * 100
    same(play(opened(folder), text, max_new_tokens=9), expected(folder, text, max_new_tokens=9))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.3, "seed": 5},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 0},
        {"stop_strings": ("\x00", "e", "a")},
        {"eos_token_id": tuple(range(0, 259, 9))},
    ],
)
def test_draws_and_ends_are_those_of_generate(values: dict[str, Any], make: Make) -> None:
    folder = make()
    same(
        play(opened(folder), "hello", max_new_tokens=60, **values),
        expected(folder, "hello", max_new_tokens=60, **values),
    )


def test_an_empty_prompt_starts_from_the_beginning_token(make: Make) -> None:
    folder = make()
    solo = opened(folder)
    assert solo.tokenizer is not None
    bos = solo.tokenizer.bos
    assert bos is not None
    run = SoloStream(solo, [], Options(max_new_tokens=8))
    other = SoloStream(solo, [bos], Options(max_new_tokens=8))
    assert [event.token for event in run] == [event.token for event in other]


def test_a_state_takes_a_text_in_any_pieces(make: Make) -> None:
    engine = opened(make(depth=5, mixer=WINDOWS)).engine
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 259, 90)]
    whole, state = engine.feed(tokens, engine.empty(90))
    assert int(state.next[0]) == 90
    for cut in (1, 13, 50, 89):
        _, state = engine.feed(tokens[:cut], engine.empty(90))
        pieces, _ = engine.feed(tokens[cut:], state)
        assert np.abs(pieces - whole).max() < 1e-4 * np.abs(whole).max()


def test_what_cannot_be_fed_or_had_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    solo = opened(make(position={"name": "learned", "max_context": 40}, max_context=40))
    engine = solo.engine
    for tokens in ([], [259], [-1]):
        with pytest.raises(ValueError, match="tokens must be 1 or more of 0 to 258"):
            engine.feed(tokens, engine.empty(4))
    with pytest.raises(ValueError, match="3 more tokens than a state with room for 2 can take"):
        engine.feed([1, 2, 3], engine.empty(2))
    with pytest.raises(ValueError, match=r"position 40 does not exist: this model has 40 \(0 to 39\)"):
        engine.feed([1] * 41, engine.empty(50))
    with pytest.raises(ValueError, match=r"this model has 40: max_new_tokens can be at most 38"):
        SoloStream(solo, [1, 2, 3], Options(max_new_tokens=39))
    with pytest.raises(ValueError, match=r"token 300 is not in the vocabulary"):
        SoloStream(solo, [300], Options(max_new_tokens=2))
    monkeypatch.setattr(limits, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="GiB are available"):
        SoloStream(solo, [1], Options(max_new_tokens=2))


def test_a_row_without_numbers_is_refused_as_everywhere(make: Make) -> None:
    model = built(4, **BYTES)
    model.embedding.table.data[5] = float("nan")
    packed = pack_model(model, "float32")
    folder = make()
    save_packed(packed, folder, tokenizer=Tokenizer.bytes(), overwrite=True)
    with pytest.raises(ValueError, match="row 0: the model produced NaN logits"):
        list(SoloStream(opened(folder), [5], Options(max_new_tokens=2)))


@pytest.mark.parametrize("kind", MODELS)
def test_an_outline_is_the_same_behind_its_text(kind: str) -> None:
    outline = cover(built(4, **BYTES | MODELS[kind]).config).outline
    assert Outline.from_json(outline.to_json()) == outline
    assert "\n" not in outline.to_json()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place of nested objects and lists that holds something else."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from leaves(child, (*path, key))
    if not isinstance(value, (dict, list)):
        yield path, value


def changed(whole: Any, path: tuple[Any, ...], value: Any) -> str:
    copy = json.loads(json.dumps(whole))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(copy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a prompt of 6 tokens:UserWarning")
@pytest.mark.parametrize("kind", ["rotary", "sinks", "learned"])
def test_a_spoilt_outline_is_refused_or_describes_a_model_that_the_kernels_may_run(
    kind: str, make: Make
) -> None:
    folder = make(**MODELS[kind])
    whole = json.loads(read_packed_header(folder).metadata["outline"])
    refused = 0
    for path, value in leaves(whole):
        for other in (None, "x", -1, 0, 7, 2**31, 0.5, not value):
            text = changed(whole, path, other)
            rewrite(folder, text)
            solo = open_solo(folder, threads=1)
            refused += solo is None
            if solo is not None and solo.engine.outline.vocab == 259:
                try:
                    play(solo, "spoilt", max_new_tokens=3)
                except ValueError:
                    refused += 1
    assert refused > 200


def rewrite(folder: Path, outline: str) -> None:
    """Put another outline into the header of a packed model."""
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["outline"] = outline
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_what_is_not_as_saved_is_left_to_others(make: Make, tmp_path: Path) -> None:
    folder = make("int8")
    assert open_solo(tmp_path) is None
    assert open_solo("smollm2") is None
    assert open_solo(folder, dtype="int4") is None
    assert open_solo(folder, dtype="int8") is not None
    assert open_solo(make("int8", position={"name": "sinusoidal"})) is None
    folder = make()
    config = json.loads((folder / CONFIG).read_text()) | {"logit_scale": 2.0}
    (folder / CONFIG).write_text(json.dumps(config))
    assert outline_in(folder, read_packed_header(folder)) is None
    assert open_solo(folder) is None, "another config.json than the outline was made of"
    assert isinstance(open_engine(folder, threads=1).engine, NativeEngine)
    folder = make()
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-4])
    assert open_solo(folder) is None
    with pytest.raises(BadFile):
        open_engine(folder)


def test_a_model_that_the_kernels_do_not_run_has_no_outline(tmp_path: Path) -> None:
    save_packed(
        pack_model(single("gqa", stack={"name": "residual", "order": "post"}), "float32"), tmp_path / "post"
    )
    assert "outline" not in read_packed_header(tmp_path / "post").metadata
    assert open_solo(tmp_path / "post") is None


def test_only_one_plain_text_goes_without_pytorch() -> None:
    assert plain(Options(max_new_tokens=3, temperature=0.5, top_k=3, stop_strings=("x",), eos_token_id=4))
    for values in (
        {"num_beams": 2},
        {"temperature": 1.0, "num_return_sequences": 2},
        {"repetition_penalty": 1.1},
        {"prompt_lookup_num_tokens": 4},
        {"min_new_tokens": 2},
        {"decoder_start_token_id": 0},
    ):
        assert not plain(replace(Options(), **values)), values  # type: ignore[arg-type]
    assert set(asdict(Options())) >= {"min_new_tokens", "cache_dtype"}


def test_the_command_prints_the_same_text_with_and_without_pytorch(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = make("int8"), []
    for more in ((), ("--min-new-tokens", "1"), ("--engine", "native"), ("--dtype", "int8")):
        with pytest.raises(SystemExit) as ended:
            app(["generate", "hello", "--model", str(folder), "--max-new-tokens", "20", "--json", *more])
        assert not ended.value.code
        said.append(json.loads(capsys.readouterr().out))
    first = said[0]
    assert (first["engine"], first["dtype"], first["prompt_tokens"]) == ("native", "int8", 5)
    for other in said[1:]:
        assert other["generations"][0]["token_ids"] == first["generations"][0]["token_ids"]
        assert (other["engine_why"], other["memory"]["weight_bytes"]) == (
            first["engine_why"], first["memory"]["weight_bytes"]
        )  # fmt: skip
        assert other["decode"]["bytes_per_token"] == pytest.approx(
            first["decode"]["bytes_per_token"], rel=0.1
        )


def test_the_command_imports_no_torch(make: Make) -> None:
    folder = make("int8")
    code = (
        "import sys\nfrom writehead.cli import app\n"
        "try: app(['generate', 'hello', '--model', sys.argv[1], '--max-new-tokens', '9', '--temperature', '1'])\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "engine native" in done.stderr
