"""One text without PyTorch: it is what the native engine gives, or the folder is left to others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_native import built, single

from writehead.cli import app
from writehead.convert.errors import BadFile
from writehead.convert.header import Header
from writehead.convert.packed import save_packed
from writehead.convert.packed_map import CONFIG, FILE, PackedMap, read_packed_header
from writehead.convert.tokenizer import Tokenizer
from writehead.decode import limits
from writehead.decode.generate import generate
from writehead.decode.options import Options
from writehead.engines import open_engine
from writehead.native.covers import cover
from writehead.native.engine import NativeEngine
from writehead.native.kernels import Kernels
from writehead.native.library import library
from writehead.native.outline import Outline
from writehead.native.solo import SoloEngine
from writehead.native.structs import Matrix
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
    assert Outline.from_dict(json.loads(json.dumps(outline.to_dict()))) == outline


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place of nested objects and lists that holds something else."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from leaves(child, (*path, key))
    if not isinstance(value, (dict, list)):
        yield path, value


def changed(whole: Any, path: Sequence[Any], value: Any) -> Any:
    copy = json.loads(json.dumps(whole))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("kind", "path", "value", "word"),
    [
        ("rotary", "vocab", 0, "size"),
        ("rotary", "trained_context", 0, "size"),
        ("rotary", "layers.0.hidden", -1, "size"),
        ("rotary", "layers.0.lead", -1, "size"),
        ("rotary", "caches.0.kv_heads", 3, "heads"),
        ("rotary", "caches.0.layers", 1, "place"),
        ("rotary", "layers.1.place", 0, "place"),
        ("rotary", "layers.1.place", 2, "place"),
        ("rotary", "layers.1.cache", 1, "cache"),
        ("rotary", "layers.1.cache", -1, "cache"),
        ("rotary", "layers.0.activation", "tanh", "activation"),
        ("rotary", "layers.0.norms.3.kind", "batch", "norm"),
        ("rotary", "last_norm.kind", "batch", "norm"),
        ("rotary", "rotation.dim", 6, "rotation"),
        ("rotary", "rotation.frequencies", [1.0, 0.1, 0.01], "rotation"),
        ("rotary", "places", "else", "places"),
        ("rotary", "places", "table", "table"),
        ("rotary", "piece", 0, "piece"),
        ("ALiBi", "slopes", [0.5], "slopes"),
        ("sinks", "layers.0.window", 0, "window"),
        ("sinks", "layers.0.window", 5, "window"),
        ("sinks", "layers.0.lead", 3, "lead"),
        ("sinks", "caches.0.window", 2**31 - 1, "size"),
        ("sinks", "piece", None, "piece"),
        ("sinks", "piece", 17, "piece"),
    ],
)
def test_numbers_that_no_model_has_are_refused(kind: str, path: str, value: Any, word: str) -> None:
    whole = cover(built(4, **BYTES | MODELS[kind]).config).outline.to_dict()
    keys = [int(key) if key.isdigit() else key for key in path.split(".")]
    with pytest.raises(ValueError, match=f"the outline of the model has a {word} that no model has"):
        Outline.from_dict(changed(whole, keys, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["dim"], 16.0),
        (["tied"], 1),
        (["layers"], {}),
        (["embed_scale"], float("inf")),
        (["more"], 1),
        (["layers", 0], []),
    ],
)
def test_values_of_another_type_are_refused(path: list[Any], value: Any) -> None:
    whole = cover(built(4, **BYTES).config).outline.to_dict()
    with pytest.raises(ValueError, match=r"the outline of the model holds .* in the place of"):
        Outline.from_dict(changed(whole, path, value))


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a packed model, whose data stay aligned."""
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.filterwarnings("ignore:a prompt of 6 tokens:UserWarning")
@pytest.mark.parametrize(
    "kind", ["sinks", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rotary", "learned"))]
)
def test_a_spoilt_outline_is_refused_or_describes_a_model_that_the_kernels_may_run(
    kind: str, make: Make
) -> None:
    folder = make(**MODELS[kind])
    whole = json.loads(read_packed_header(folder).metadata["outline"])
    for path, value in leaves(whole):
        for other in (None, "x", -1, 0, 7, 2**31, 0.5, not value):
            text = json.dumps(changed(whole, path, other))
            edited(folder, lambda header, text=text: header["__metadata__"].update(outline=text))
            solo = open_solo(folder, threads=1)
            if type(value) is int and other in (-1, 2**31):
                assert solo is None, f"{path} is {other}"
            if solo is not None:
                with suppress(ValueError):  # what it computes may be no number
                    play(solo, "spoilt", max_new_tokens=3)


def test_what_is_not_as_saved_is_left_to_others(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("int8")
    assert open_solo(tmp_path) is None
    assert open_solo(folder, dtype="int4") is None
    assert open_solo(folder, dtype="int8") is not None
    folder.rename(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert open_solo("smollm2") is None, "a name that is a package's is no folder's"
    assert open_solo("./smollm2") is not None
    assert open_solo(make("int8", position={"name": "sinusoidal"})) is None


def another_config(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text()) | {"logit_scale": 2.0}
    (folder / CONFIG).write_text(json.dumps(config))


SPOILT: dict[str, tuple[Callable[[Path], object], bool]] = {  # and whether the usual way takes it
    "another config.json": (another_config, True),
    "a huge config.json": (lambda f: os.truncate(f / CONFIG, 2**25), False),
    "a file that is cut": (lambda f: os.truncate(f / FILE, (f / FILE).stat().st_size - 4), False),
    "no outline": (lambda f: edited(f, lambda h: h["__metadata__"].pop("outline")), True),
    "an outline that is no object": (
        lambda f: edited(f, lambda h: h["__metadata__"].update(outline="[" * 10**5)), True,
    ),
    "another format": (lambda f: edited(f, lambda h: h["__metadata__"].update(format="\x1b[31m")), False),
    "another name": (lambda f: edited(f, lambda h: h.update(more=h.pop("embedding.bias"))), False),
    "another count": (lambda f: edited(f, lambda h: h["__metadata__"].update(tensors="1")), True),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_that_was_changed_is_left_to_the_engine_that_explains(what: str, make: Make) -> None:
    folder = make(tie_embeddings=False, head_bias=True)
    assert open_solo(folder) is not None
    spoil, taken = SPOILT[what]
    spoil(folder)
    assert open_solo(folder) is None
    if taken:
        assert isinstance(open_engine(folder, threads=1).engine, NativeEngine)
    else:
        with pytest.raises(BadFile):
            open_engine(folder)


def test_tensors_beyond_the_end_or_between_two_addresses_are_refused(make: Make) -> None:
    folder = make()
    header = read_packed_header(folder)
    (name, entry) = max(header.tensors.items(), key=lambda item: item[1].end)
    beyond = {name: entry._replace(begin=entry.begin + 64, end=entry.end + 64)}
    between = {name: entry._replace(begin=entry.begin - 2, end=entry.end - 2)}
    for tensors in (beyond, between):
        found = PackedMap(folder, Header(tensors, {}))
        with pytest.raises(
            ValueError, match="lies beyond the end of the file, or not as its numbers are wide"
        ):
            found._address(name, tensors[name])


def test_a_matrix_too_large_for_the_kernels_is_refused() -> None:
    outline = cover(built(4, **BYTES).config).outline
    with pytest.raises(ValueError, match=r"stack.blocks.0.mixer.qkv.weight of \d+ x 16 is too large"):
        Kernels(replace(outline, caches=(replace(outline.caches[0], heads=2**24, kv_heads=1),)), Nothing())


class Nothing:
    """No weights."""

    def matrix(self, name: str, n: int, k: int) -> Matrix:
        return Matrix(0, n, k)

    def vector(self, name: str, size: int) -> int | None:
        return None


def test_a_model_that_the_kernels_do_not_run_has_no_outline(tmp_path: Path) -> None:
    save_packed(
        pack_model(single("gqa", stack={"name": "residual", "order": "post"}), "float32"), tmp_path / "post"
    )
    assert "outline" not in read_packed_header(tmp_path / "post").metadata
    assert open_solo(tmp_path / "post") is None


def test_only_one_plain_text_goes_without_pytorch() -> None:
    honoured = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 1}
    assert plain(Options(max_new_tokens=3, stop_strings=("x",), eos_token_id=4, **honoured))  # type: ignore[arg-type]
    others = {
        "num_beams": {"num_beams": 2},
        "num_return_sequences": {"temperature": 1.0, "num_return_sequences": 2},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 4},
        "min_new_tokens": {"min_new_tokens": 2},
        "decoder_start_token_id": {"decoder_start_token_id": 0},
        "cache_dtype": {"cache_dtype": torch.int8},
        "length_penalty": {"num_beams": 2, "length_penalty": 0.5},
        "beam_rule": {"num_beams": 2, "beam_rule": "gnmt"},
        "early_stopping": {"num_beams": 2, "early_stopping": True},
    }
    assert not any(plain(Options(**values)) for values in others.values())  # type: ignore[arg-type]
    named = {*others, *honoured, "max_new_tokens", "stop_strings", "eos_token_id"}
    assert named == {field.name for field in fields(Options)}, "is a new option honoured?"


def test_the_command_prints_the_same_text_with_and_without_pytorch(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = make("int8"), []
    for more in ((), ("--min-new-tokens", "1"), ("--engine", "native"), ("--dtype", "int8"), ("--roofline",)):
        with pytest.raises(SystemExit) as ended:
            app(["generate", "hello", "--model", str(folder), "--max-new-tokens", "20", "--json", *more])
        assert not ended.value.code
        said.append(json.loads(capsys.readouterr().out))
    first = said[0]
    assert (first["engine"], first["dtype"], first["prompt_tokens"]) == ("native", "int8", 5)
    usual = first["engine_why"].removesuffix(", without PyTorch")
    whys = [one["engine_why"] for one in said]
    assert whys == [f"{usual}, without PyTorch", usual, *[f"{usual}, without PyTorch"] * 3]
    for other in said[1:]:
        assert other["generations"][0]["token_ids"] == first["generations"][0]["token_ids"]
        assert other["memory"]["weight_bytes"] == first["memory"]["weight_bytes"]
        own, theirs = (one["decode"]["bytes_per_token"] for one in (other, first))
        assert own == pytest.approx(theirs, rel=0.1)


def test_ctrl_c_prints_what_there_is_and_ends_with_130(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, feed = make(), SoloEngine.feed

    def once(self: SoloEngine, tokens: Any, state: Any) -> Any:
        if int(state.next[0]) == 9:
            raise KeyboardInterrupt
        return feed(self, tokens, state)

    monkeypatch.setattr(SoloEngine, "feed", once)
    with pytest.raises(SystemExit) as ended:
        app(["generate", "hello", "--model", str(folder), "--max-new-tokens", "20", "--json"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (130, "error: interrupted\n")
    (one,) = json.loads(out)["generations"]
    assert (len(one["token_ids"]), one["finish_reason"]) == (5, "interrupted")


def test_a_folder_without_a_tokenizer_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        app(["generate", "hello", "--model", str(folder)])
    assert "has no tokenizer, so it can read no text" in capsys.readouterr().err


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
