"""A run that stops and goes on gives the bits of one that did not: every optimiser, precision and data."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small import TEXT, assert_same, begun, log, train, values, write
from writehead.train import checkpoint
from writehead.train.loop import Trainer

LABELLED = "".join(f"{'even' if n % 2 == 0 else 'odd'}\tnumber {n} {'x' * (n % 13)}\n" for n in range(60))
PAIRS = "".join(f"say {n}{' please' * (n % 3)}\tsag {n}{' bitte' * (n % 3)}\n" for n in range(60))
RING = {"name": "local_mqa", "heads": 2, "pattern": {"name": "window", "window": 24}}
ENCODER = {"dim": 16, "depth": 1, "mixer": {"name": "bidirectional", "heads": 2}, "kind": "encoder"}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adafactor": {"optim": {"name": "adafactor"}},
    "pieces": {"loop": {"accumulate": 2, "steps": 6}},
    "bfloat16": {"loop": {"precision": "bfloat16", "steps": 6}},
    "recompute": {"loop": {"recompute": True, "steps": 6}},
    "carry": {
        "loop": {"carry_state": True, "accumulate": 2, "steps": 6},
        "model": {"mixer": RING},
        "data": {"length": 16, "batch": 4},
    },
    "bpe": {"data": {"tokenizer": {"name": "bpe", "vocab": 280}, "length": 16, "batch": 4}},
    "losses": {
        "loss": {"label_smoothing": 0.1, "z_loss": 0.001},
        "optim": {"schedule": "inverse_sqrt", "warmup": 2},
    },
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_stopped(
    name: str, stop: int, tmp_path: Path
) -> None:
    given = values(write(tmp_path), **RUNS[name])
    whole = train(given, tmp_path / "whole")
    with begun(given, tmp_path / "cut") as trainer:
        while trainer.step < stop + 1:  # one step more than was saved
            trainer._report(trainer.make_step(), trainer.step % 2 == 0)
            if trainer.step == stop:
                trainer.save()
    assert_same(train(given, tmp_path / "cut", resume="auto"), whole)
    later = [line for line in log(tmp_path / "whole") if line["step"] > stop]
    assert [line for line in log(tmp_path / "cut") if line["step"] > stop] == later


@pytest.mark.parametrize("kind", ["labelled", "parallel"])
def test_labelled_texts_and_pairs_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    text = write(tmp_path, "lines.tsv", LABELLED if kind == "labelled" else PAIRS)
    model: dict[str, Any] = {**ENCODER, "stack": {"name": "residual", "dropout": 0.1}}
    if kind == "parallel":
        model = {**model, "kind": "seq2seq", "mixer": {"name": "mqa", "heads": 2}, "encoder": ENCODER}
        model["cross"] = {"name": "cross", "heads": 2, "kv_heads": 1}
    given = values(text, data={"kind": kind, "length": 40, "batch": 4}) | {"model": model}
    whole = train(given, tmp_path / "whole")
    with begun(given, tmp_path / "again") as trainer:
        for _ in range(3):
            trainer.make_step()
        trainer.save()
    assert_same(train(given, tmp_path / "again", resume="auto"), whole)


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    given = values(write(tmp_path))
    train(given, tmp_path / "out")
    longer = values(write(tmp_path), loop={"steps": 9})
    assert train(longer, tmp_path / "out", resume="auto").name == "checkpoint-00000009"
    assert [line["step"] for line in log(tmp_path / "out") if "train/loss" in line] == [2, 4, 6, 8, 9]


def test_a_finished_run_resumes_to_its_own_end(tmp_path: Path) -> None:
    given = values(write(tmp_path))
    assert train(given, tmp_path / "out", resume="auto") == train(given, tmp_path / "out", resume="auto")


def test_an_explicit_checkpoint_starts_a_second_run(tmp_path: Path) -> None:
    given = values(write(tmp_path))
    whole = train(given, tmp_path / "a")
    early = checkpoint.path_of(tmp_path / "a", 2)
    assert_same(train(given, tmp_path / "b", resume=str(early)), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_after_the_step_and_the_run_goes_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = values(write(tmp_path))
    whole = train(given, tmp_path / "whole")
    step = Trainer.make_step

    def interrupted(self: Trainer) -> float:
        if self.step == 2:
            signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(Trainer, "make_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "cut")
    monkeypatch.undo()
    assert (tmp_path / "cut" / "latest").resolve().name == "checkpoint-00000003"
    assert_same(train(given, tmp_path / "cut", resume="auto"), whole)


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one did not end it")

    monkeypatch.setattr(Trainer, "make_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(values(write(tmp_path)), tmp_path / "out")
    assert checkpoint.found(tmp_path / "out") == []


def test_a_broken_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = values(write(tmp_path))
    whole = train(given, tmp_path / "whole")
    train(given, tmp_path / "cut")
    newest = checkpoint.path_of(tmp_path / "cut", 6) / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert_same(train(given, tmp_path / "cut", resume="auto"), whole)
    said = " ".join(capsys.readouterr().err.split())
    assert "model.safetensors: is not the file that was written: its SHA-256 differs" in said.replace(
        "- ", "-"
    )


def test_what_would_change_the_run_is_refused(tmp_path: Path) -> None:
    text = write(tmp_path)
    train(values(text), tmp_path / "out")
    with pytest.raises(ValueError, match=r"checkpoint-00000006 was made with optim.lr=0.01; got 0.02"):
        train(values(text, optim={"lr": 0.02}), tmp_path / "out", resume="auto")
    with pytest.raises(ValueError, match="holds a run at step 6; continue it with --resume auto"):
        train(values(text), tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no checkpoint .*nowhere"):
        train(values(text), tmp_path / "out", resume="nowhere")
    write(tmp_path, text=TEXT + "more")
    with pytest.raises(ValueError, match=r"the data is not what .*checkpoint-00000006 was trained on"):
        train(values(text), tmp_path / "out", resume="auto")


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    given = values(write(tmp_path))
    with (
        begun(given, tmp_path / "out"),
        pytest.raises(ValueError, match="another process is training into"),
        begun(given, tmp_path / "out"),
    ):
        pass


def test_training_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(values(write(tmp_path)), tmp_path / "out")
    assert torch.rand(1) == expected
