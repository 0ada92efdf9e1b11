"""`writehead train` and `writehead evaluate`: one command each, and one line for whatever goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from tests.train.small import TEXT, values, write
from tests.train.test_parallel import runs
from writehead.cli import app
from writehead.train.config import RunConfig
from writehead.train.values import override, read_values

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb in this process."""
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def call(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            app(list(arguments), prog_name="writehead")
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values(write(tmp_path))))
    return str(path)


def test_train_writes_a_checkpoint_that_generate_and_evaluate_open(
    run: Run, config: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    ran = run("train", config, "optim.lr=0.02", "--out", out)
    assert (ran.code, ran.out) == (0, f"{out}/checkpoint-00000006\n")
    assert "step 6/6  loss " in ran.err
    assert "evaluation: loss " in ran.err
    assert "sample: " in ran.err
    said = run("generate", "line", "--model", out, "--max-new-tokens", "4")
    assert said.code == 0
    assert said.err.startswith("prefill 4 tokens")
    text = write(tmp_path, "test.txt", TEXT[:300])
    found = run("evaluate", f"{out}/latest", text, "--stride", "8", "--json")
    scores = json.loads(found.out)
    assert (scores["bytes"], scores["tokens"], scores["protocol"]) == (
        300,
        301,
        "sliding: window 16, stride 8",
    )
    assert 1 < scores["byte_perplexity"] < 400
    assert scores["machine"]["versions"]["torch"]
    plain = run("evaluate", out, text)
    assert "windows apart: window 16, stride 16" in plain.out


def test_resume_auto_needs_no_config_and_goes_on(run: Run, config: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("train", config, "--out", out, "--resume", "auto").code == 0
    again = run("train", "loop.steps=8", "--out", out, "--resume", "auto")
    assert (again.code, again.out) == (0, f"{out}/checkpoint-00000008\n")
    assert "resumed from" in again.err
    refused = run("train", config, "--out", out)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "holds a run at step 8; continue it with --resume auto, or choose another folder" in refused.err


def test_the_config_is_printed_whole_and_is_the_same_run_again(run: Run, config: str, tmp_path: Path) -> None:
    ran = run("train", config, "model.depth=3", "--print-config")
    path = tmp_path / "printed.yaml"
    path.write_text(ran.out)
    expected = RunConfig.from_dict(override(read_values(Path(config)), ["model.depth=3"]))
    assert RunConfig.from_dict(read_values(path)) == expected
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_run_costs(run: Run, config: str, tmp_path: Path) -> None:
    ran = run("train", config, "--dry-run")
    assert ran.code == 0
    for word in (
        "parameters",
        "memory, about",
        "operations a step",
        "time of all steps",
        "passes over the data",
    ):
        assert word in ran.out
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "--out DIR is needed"),
        (["train", "none.yaml", "--out", "x"], 2, "there is no config 'none.yaml'; write overrides as key=value"),
        (["train", "etc-toi", "--out", "x"], 2, "did you mean 'etc-toy'?; write overrides as key=value (presets: sparse-enwik8, "),
        (["train", "a.yaml", "b.yaml", "--out", "x"], 2, "'b.yaml' is neither the only CONFIG nor key=value"),
        (["train", "optim.lrr=1", "--out", "x"], 1, "unknown key of optim 'lrr'; did you mean 'lr'?"),
        (["train", "data.train=nowhere", "--out", "x"], 1, "there is no 'nowhere'"),
        (["train", "data.train=empty.txt", "--out", "x"], 1, "empty.txt: is empty"),
        (["train", "dta.length=3", "--out", "x"], 1, "unknown key 'dta'; did you mean 'data'?"),
        (["train", "data.train=label.tsv", "data.kind=labelled", "--out", "x"], 1,
         "label.tsv, line 2: the label is missing"),
        (["train", "data.train=text.tsv", "data.kind=labelled", "--out", "x"], 1,
         "text.tsv, line 2: has 1 columns, not the 2 of label and text: the text is missing"),
        (["train", "data.train=stray.tsv", "data.kind=parallel", "model.kind=seq2seq", "--out", "x"], 1,
         "stray.tsv, line 2: has 3 columns, not the 2 of source and target: a stray tab?"),
        (["train", "data.train=hf:nowhere:a:b:c", "--out", "x"], 1, "is no data set; write hf:NAME"),
        (["train", "data.train=hf:table", "--out", "x"], 1, "doesn't contain any data files"),
        (["train", "--out", "file"], 1, "file: File exists"),
        (["evaluate", "nowhere", "text.txt"], 1, "there is no model 'nowhere'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_a_code(
    run: Run, arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "label.tsv").write_text("good\ta text\n\tno label\n")
    (tmp_path / "text.tsv").write_text("good\ta text\nno label\n")
    (tmp_path / "stray.tsv").write_text("ein\tone\nzwei\ttwo\t\n")
    (tmp_path / "table").mkdir()
    ran = run(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)
    assert ran.err.startswith("error: ")
    assert message in ran.err.replace('"', "'")


def test_a_loss_that_is_no_number_ends_with_the_step_the_checkpoint_and_advice(
    run: Run, config: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run(
        "train", config, "--out", str(out), "optim.lr=1e30", "report.save_every=1", "report.eval_every=0"
    )
    assert (ran.code, ran.out) == (1, "")
    said = ran.err.splitlines()[-1]
    where = re.escape(str(out))
    assert re.fullmatch(
        rf"error: step \d+ gave (loss|gradient norm) (nan|inf); the last good checkpoint is {where}/checkpoint-\d+\. "
        r"Try a lower optim\.lr \(now 1e\+30\), a longer optim\.warmup \(now 2\).*",
        said,
    )


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (1 << 10, "File too large"),  # no place for the tokens
        (1 << 17, "the checkpoint of step 2 cannot be written: "),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(
    run: Run, config: str, tmp_path: Path, limit: int, message: str
) -> None:
    resource = pytest.importorskip("resource", reason="needs limits of files")
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        ran = run("train", config, "--out", str(tmp_path / "out"), "model.dim=128", "report.eval_every=0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    said = ran.err.splitlines()[-1]
    assert (ran.code, ran.out) == (1, "")
    assert said.startswith("error: ")
    assert message in said
    assert str(tmp_path / "out") in said or "model.safetensors" in said
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.slow
def test_classifiers_and_translators_are_trained_and_scored(run: Run, tmp_path: Path) -> None:
    for kind, given in runs(tmp_path).items():
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(given))
        if kind != "text":
            assert run("train", str(tmp_path / f"{kind}.yaml"), "--out", str(tmp_path / kind)).code == 0
    found = run("evaluate", str(tmp_path / "labelled" / "latest"), str(tmp_path / "labelled.tsv"), "--json")
    scores = json.loads(found.out)
    assert scores["accuracy"] == scores["right"] / 60
    refused = run("evaluate", str(tmp_path / "labelled" / "latest"), "x", "--stride", "3")
    assert "--window, --stride and --carry are for decoders of text" in refused.err
    translated = run(
        "evaluate", str(tmp_path / "parallel" / "latest"), str(tmp_path / "pairs.tsv"), "--num-beams", "2"
    )
    assert "BLEU needs the package sacrebleu" in translated.err or "signature" in translated.out


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_with_130(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "writehead", "train", config, "loop.steps=100000", "--out", str(out)]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    while not (out / "latest").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert err.endswith("go on with --resume auto\nerror: interrupted\n")
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_loads_and_steps(
    path: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "stdlib.txt", TEXT * 12)
    for name in ("labelled.tsv", "train.tsv", "valid.tsv"):
        write(
            tmp_path,
            name,
            "".join(f"{'ab'[n % 2]}\ttext number {n} of some {n * 7919}\n" for n in range(400)),
        )
    digits = np.random.default_rng(0).integers(0, 256, (2, 12, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=digits[0], x_test=digits[1])
    given = read_values(path)
    assert set(given) <= {"model", "data", "masks", "optim", "loss", "loop", "report"}
    over = ["loop.steps=2", "data.batch=4", "report.eval_batches=1", "report.sample_tokens=4"]
    if given["data"]["train"] == ["stdlib"]:
        over.append("data.train=stdlib.txt")
    if given["data"].get("tokenizer", {}).get("name") == "bpe":
        over.append("data.tokenizer.vocab=300")
    ran = run("train", str(path), *over, "--out", "out")
    assert (ran.code, ran.out) == (0, "out/checkpoint-00000002\n")


@pytest.mark.slow
def test_no_argument_but_a_folder_trains_on_pythons_own_sources(run: Run, tmp_path: Path) -> None:
    ran = run(
        "train",
        "loop.steps=2",
        "report.eval_batches=1",
        "report.sample_tokens=4",
        "--out",
        str(tmp_path / "out"),
    )
    assert ran.code == 0
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["data"]["train"] == ["stdlib"]
