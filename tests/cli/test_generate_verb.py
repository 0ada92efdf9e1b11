"""`writehead generate`: text out, speeds beside it, and one line for whatever goes wrong."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from writehead.cli import app
from writehead.cli.models import decoder_start
from writehead.config import ModelConfig
from writehead.convert.load import load, save
from writehead.convert.tokenizer import Tokenizer
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


class Terminal(io.StringIO):
    """Someone who may type, but does not."""

    def isatty(self) -> bool:
        return True


def small(**values: Any) -> ModelConfig:
    spec = {"name": "mqa", "heads": 2}
    given = {"vocab": 259, "dim": 16, "depth": 1, "mixer": spec, "max_context": 64} | values
    return ModelConfig(feedforward={"name": "dense", "hidden": 16}, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over bytes, whose texts wander."""
    torch.manual_seed(5)
    model = Decoder(small(tie_embeddings=False))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    tokenizer = Tokenizer.bytes()
    tokenizer.template = TEMPLATE
    path = tmp_path_factory.mktemp("models") / "bytes"
    save(model, path, tokenizer=tokenizer)
    return path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str, stdin: str | None = None, model: bool = True) -> Ran:
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        own = ["--engine", "torch", "--threads", "1", *(["--model", str(folder)] if model else [])]
        with pytest.raises(SystemExit) as ended:
            app(["generate", *own, *args])
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return call


def expected(folder: Path, text: str, **values: Any) -> Any:
    loaded = load(folder)
    ids = loaded.tokenizer.encode(text)  # type: ignore[union-attr]
    return generate(loaded.model, [ids], tokenizer=loaded.tokenizer, **values)  # type: ignore[arg-type]


def test_the_text_goes_to_standard_output_and_speeds_to_standard_error(run: Run, folder: Path) -> None:
    ran = run("hello", "--max-new-tokens", "20")
    assert ran.code == 0
    assert ran.out == f"{expected(folder, 'hello', max_new_tokens=20)[0].text}\n"
    assert ran.err.startswith("prefill 5 tokens, ")
    assert "; decode 19 tokens, " in ran.err
    assert ran.err.endswith("; engine torch (float32; not the native one, since it was asked for)\n")
    assert ran.err.count("\n") == 1


def test_a_prompt_comes_from_standard_input_too(run: Run) -> None:
    given = run("hello", "--max-new-tokens", "8").out
    assert run("-", "--max-new-tokens", "8", stdin="hello\n").out == given
    assert run("--max-new-tokens", "8", stdin="hello").out == given


def test_json_holds_tokens_log_probabilities_and_both_speeds(run: Run, folder: Path) -> None:
    ran = run("hello", "--max-new-tokens", "12", "--json")
    assert ran.code == 0
    assert ran.err == ""
    said, own = json.loads(ran.out), expected(folder, "hello", max_new_tokens=12)
    (one,) = said["generations"]
    assert one["token_ids"] == own[0].tokens
    assert one["logprobs"] == pytest.approx(own[0].logprobs, abs=1e-5)
    assert (one["text"], one["finish_reason"], one["score"]) == (own[0].text, own[0].finish_reason, None)
    assert (said["prompt_tokens"], said["prefill"]["tokens"], said["decode"]["tokens"]) == (5, 5, 11)
    assert (said["engine"], said["dtype"]) == ("torch", "float32")
    for part in ("prefill", "decode"):
        speed = said[part]["tokens"] / said[part]["seconds"]
        assert said[part]["tokens_per_second"] == pytest.approx(speed)
    assert said["decode"]["bytes_per_token"] > TorchEngine(load(folder).model).weight_bytes()  # type: ignore[arg-type]
    assert said["bandwidth"]["share"] is None


def test_sampling_options_reach_the_decoder(run: Run, folder: Path) -> None:
    values = {
        "temperature": 1.5,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "seed": 3,
    }
    flags = [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    ran = run("hello", "--max-new-tokens", "20", *flags, "--num-return-sequences", "2")
    own = expected(folder, "hello", max_new_tokens=20, num_return_sequences=2, **values)
    assert ran.out == f"--- 1\n{own[0].text}\n--- 2\n{own[1].text}\n"


def test_beams_are_printed_with_their_scores(run: Run, folder: Path) -> None:
    flags = ("--num-beams", "3", "--length-penalty", "0.5", "--early-stopping")
    ran = run("hello", "--max-new-tokens", "6", *flags, "--num-return-sequences", "2")
    values: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}
    own = expected(folder, "hello", max_new_tokens=6, num_return_sequences=2, **values)
    assert ran.out == "".join(f"--- {n} (score {g.score:.4f})\n{g.text}\n" for n, g in enumerate(own, 1))
    assert run("hello", "--max-new-tokens", "6", *flags).out == f"{own[0].text}\n"


def test_stop_strings_and_speculation_reach_the_decoder(run: Run, folder: Path) -> None:
    text = expected(folder, "hello", max_new_tokens=30)[0].text
    stop = text[4:6]
    ran = run(
        "hello", "--max-new-tokens", "30", "--stop", "no such text", "--stop", stop, "--prompt-lookup", "4"
    )
    assert ran.out == f"{text[: text.index(stop)]}\n"


def test_a_chat_follows_the_models_template(run: Run) -> None:
    plain = run("<system>be brief<user>hello>", "--max-new-tokens", "8").out
    assert run("hello", "--chat", "--system", "be brief", "--max-new-tokens", "8").out == plain


@pytest.mark.parametrize(
    "flags", [("--dtype", "bfloat16"), ("--cache-dtype", "int8"), ("--min-new-tokens", "4")]
)
def test_types_and_least_lengths_are_accepted(run: Run, flags: tuple[str, ...]) -> None:
    ran = run("hello", "--max-new-tokens", "5", *flags)
    assert ran.code == 0
    assert "; decode 4 tokens" in ran.err


def test_the_share_of_the_bandwidth_is_reported_when_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    from writehead.bench import machine

    monkeypatch.setattr(machine, "read_bandwidth", lambda size, threads: asked.append((size, threads)) or 5e9)
    assert "% of the 5 GB/s that this machine reads" in run("hi", "--max-new-tokens", "4", "--roofline").err
    said = json.loads(run("hi", "--max-new-tokens", "4", "--roofline", "--json").out)["bandwidth"]
    assert said["machine_bytes_per_second"] == 5e9
    assert said["share"] == pytest.approx(said["bytes_per_second"] / 5e9)
    assert asked == [(2**24, 1)] * 2


def test_leaving_the_trained_context_warns_in_one_line(run: Run) -> None:
    ran = run("hello", "--max-new-tokens", "61")
    assert ran.code == 0
    assert ran.err.startswith("warning: a prompt of 5 tokens and max_new_tokens=61 go beyond the 64 tokens")
    assert ran.err.count("\n") == 2


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_ctrl_c_prints_what_there_is_and_ends_with_130(
    run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path, json_flag: tuple[str, ...]
) -> None:
    steps = []
    whole = TorchEngine.step

    def step(self: Any, tokens: Any, state: Any) -> Any:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return whole(self, tokens, state)

    monkeypatch.setattr(TorchEngine, "step", step)
    ran = run("hello", "--max-new-tokens", "20", *json_flag)
    monkeypatch.undo()
    assert ran.code == 130
    assert ran.err.endswith("error: interrupted\n")
    ids = expected(folder, "hello", max_new_tokens=20)[0].tokens[:6]
    if json_flag:
        (one,) = json.loads(ran.out)["generations"]
        assert (one["token_ids"], one["finish_reason"]) == (ids, "interrupted")
    else:
        assert ran.out.endswith("\n")
        text = bytes(i for i in ids if i < 256).decode(errors="replace")
        assert text.startswith(ran.out.removesuffix("\n"))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["x", "--temperature", "-1"], 2, "temperature=-1.0 must be 0 (greedy) or more; nearest is 0"),
        (["x", "--top-k", "4"], 2, "top_k=4 has no effect at temperature=0"),
        (["x", "--num-beams", "2", "--temperature", "1"], 2, "temperature=1.0 does not go with num_beams=2"),
        (["x", "--max-new-tokens", "0"], 2, "max_new_tokens=0 must be a whole number of at least 1"),
        (["x", "--engine", "jax"], 2, "unknown --engine 'jax' (accepted: auto, native, torch)"),
        (["x", "--dtype", "float8"], 2, "unknown --dtype 'float8'"),
        (["x", "--cache-dtype", "int4"], 2, "unknown --cache-dtype 'int4'; did you mean 'int8'?"),
        (["x", "--system", "s"], 2, "--system belongs to a chat: give --chat too"),
        (["x", "--threads", "0"], 2, "Invalid value for '--threads'"),
        (["x", "--tempratur", "1"], 2, "No such option: --tempratur"),
        (["x", "--stop", ""], 2, "stop_strings: '' is not a string of at least one character"),
        (["x" * 20, "--max-new-tokens", "999999999"], 1, "GiB are available: shorten the prompt"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_code(
    run: Run, flags: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from writehead.decode import limits

    monkeypatch.setattr(limits, "available_memory", lambda: 2**30)
    ran = run(*flags)
    assert ran.code == code
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert ran.out == ""


def test_an_empty_prompt_starts_from_the_beginning_token(run: Run, folder: Path) -> None:
    own = generate(load(folder).model, [[256]], tokenizer=Tokenizer.bytes(), max_new_tokens=6)  # type: ignore[arg-type]
    assert run("", "--max-new-tokens", "6").out == f"{own[0].text}\n"


def test_nothing_to_read_is_a_usage_error(run: Run) -> None:
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert "give a PROMPT, or pipe one to standard input" in ran.err


def test_a_model_without_tokenizer_or_decoder_is_refused(run: Run, tmp_path: Path) -> None:
    save(Decoder(small()), tmp_path / "bare")
    ran = run("x", "--model", str(tmp_path / "bare"), model=False)
    assert ran.code == 1
    assert "has no tokenizer, so it can read no text" in ran.err
    encoder = Encoder(small(kind="encoder", mixer={"name": "bidirectional", "heads": 2}))
    save(encoder, tmp_path / "encoder", tokenizer=Tokenizer.bytes())
    ran = run("x", "--model", str(tmp_path / "encoder"), model=False)
    assert ran.code == 1
    assert ran.err == "error: Encoder cannot decode; give a Decoder or a Seq2Seq\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_compiled_parts_give_the_same_text(run: Run) -> None:
    plain = run("hello", "--max-new-tokens", "12").out
    assert run("hello", "--max-new-tokens", "12", "--compile").out == plain


def test_a_translation_starts_where_its_checkpoint_says_or_from_padding(tmp_path: Path) -> None:
    assert decoder_start(tmp_path, 7) == 7
    (tmp_path / "config.json").write_text('{"decoder_start_token_id": 2}')
    assert decoder_start(tmp_path, 7) == 2
    (tmp_path / "config.json").write_text('{"decoder_start_token_id": "2"}')
    with pytest.raises(ValueError, match="decoder_start_token_id='2' must be a token"):
        decoder_start(tmp_path, 7)
