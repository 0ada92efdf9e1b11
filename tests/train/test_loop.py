"""What a run does between steps, and how it ends when something is wrong."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small import TEXT, assert_same, begun, log, train, values, write
from writehead.convert.errors import BadFile
from writehead.convert.load import load
from writehead.decode.generate import generate
from writehead.train import carry, checkpoint
from writehead.train.config import RunConfig
from writehead.train.estimate import _kept, _passes, estimate
from writehead.train.loop import Diverged, Trainer
from writehead.train.start import to_yaml


@pytest.mark.slow
def test_a_model_learns_its_text_and_its_checkpoint_decodes(tmp_path: Path) -> None:
    given = values(
        write(tmp_path, text="the cat sat on the mat. " * 80),
        loop={"steps": 100},
        report={"eval_every": 0, "save_every": 0, "sample": None},
    )
    given["model"] |= {"dim": 32, "stack": {"name": "residual"}}
    last = train(given, tmp_path / "out")
    losses = [line["train/loss"] for line in log(tmp_path / "out") if "train/loss" in line]
    assert losses[0] > 5
    assert losses[-1] < 0.3
    assert (tmp_path / "out" / "latest").resolve() == last.resolve()
    loaded = load(last)
    prompt = loaded.tokenizer.encode("the cat")  # type: ignore[union-attr]
    (said,) = generate(loaded.model, [prompt], tokenizer=loaded.tokenizer, max_new_tokens=9)  # type: ignore[arg-type]
    assert said.text == " sat on t"


def test_the_last_checkpoints_are_kept_and_each_is_a_model(tmp_path: Path) -> None:
    train(values(write(tmp_path), report={"keep": 2}), tmp_path / "out")
    assert [p.name for p in checkpoint.found(tmp_path / "out")] == [
        "checkpoint-00000006",
        "checkpoint-00000004",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "checkpoint-00000004", "checkpoint-00000006", "data", "latest", "log.jsonl", "run.yaml",
    ]  # fmt: skip
    assert load(tmp_path / "out" / "checkpoint-00000004").config.max_context == 16


def test_the_log_says_what_happened_in_numbers(tmp_path: Path) -> None:
    train(values(write(tmp_path)), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], next(k for k in line if k != "step")) for line in lines] == [
        (2, "train/loss"), (3, "eval/loss"), (4, "train/loss"), (6, "train/loss"), (6, "eval/loss"),
    ]  # fmt: skip
    assert set(lines[0]) == {
        "step", "train/loss", "train/accuracy", "lr", "grad_norm", "tokens_per_second", "memory_bytes",
    }  # fmt: skip
    assert lines[-1]["eval/perplexity"] == pytest.approx(math.exp(lines[-1]["eval/loss"]))
    assert lines[0]["memory_bytes"] > 2**26


def test_reports_never_change_the_weights(tmp_path: Path) -> None:
    text = write(tmp_path)
    quiet = {"log_every": 9, "eval_every": 0, "save_every": 0, "sample": None}
    loud = {"log_every": 1, "eval_every": 1, "save_every": 1, "sample": "line"}
    assert_same(*(train(values(text, report=r), tmp_path / str(i)) for i, r in enumerate((quiet, loud))))


def test_pieces_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    given = values(write(tmp_path), model={"stack": {"name": "residual"}})
    norms = []
    for pieces in (1, 2, 4):
        given["loop"] = {"steps": 6, "accumulate": pieces}
        with begun(given, tmp_path / str(pieces)) as trainer:
            norms.append([trainer.make_step() for _ in range(3)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_clipping_bounds_the_step_and_not_the_norm_that_is_reported(tmp_path: Path) -> None:
    with begun(values(write(tmp_path), loop={"clip": 1e-3, "steps": 6}), tmp_path / "out") as trainer:
        norm = trainer.make_step()
        sizes = [s["exp_avg"].square().sum() for s in trainer.optimizer.state.values()]
    assert norm > 0.1
    assert math.sqrt(sum(sizes)) == pytest.approx(1e-3 * 0.1, rel=1e-2)  # 1 - the first beta


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_with_what_to_try(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.make_step

    def poisoned(self: Trainer) -> float:
        if self.step == 4:
            table = self.model.embedding.table  # type: ignore[union-attr]
            if bad == "loss":
                table.data.fill_(math.nan)
            else:
                table.register_hook(lambda gradient: gradient * math.inf)
        return step(self)

    monkeypatch.setattr(Trainer, "make_step", poisoned)
    what = "loss nan" if bad == "loss" else "gradient norm (nan|inf)"
    with pytest.raises(Diverged, match=rf"step 5 gave {what}; the last good checkpoint is .*checkpoint-00000004. Try "
                       r"a lower optim.lr \(now 0.01\), a longer optim.warmup \(now 2\), loop.clip=1.0 \(now off\)"):  # fmt: skip
        train(values(write(tmp_path), loop={"clip": 0, "steps": 6}), tmp_path / "out")
    assert checkpoint.newest(tmp_path / "out")[0] == checkpoint.path_of(tmp_path / "out", 4)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, wrote = values(write(tmp_path)), []

    def full(path: Path, tensors: Any) -> None:
        wrote.append(path)
        if len(wrote) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, tensors)

    real = checkpoint._save
    monkeypatch.setattr(checkpoint, "_save", full)
    with pytest.raises(ValueError, match=r"checkpoint of step 4 cannot be written: No space left on device; the last "
                       r"good checkpoint is .*checkpoint-00000002"):  # fmt: skip
        train(given, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".checkpoint*"))
    monkeypatch.undo()
    assert_same(train(given, tmp_path / "out", resume="auto"), train(given, tmp_path / "whole"))


def test_every_file_of_a_checkpoint_is_in_its_manifest(tmp_path: Path) -> None:
    last = train(values(write(tmp_path)), tmp_path / "out")
    checkpoint.check(last)
    (last / "more.txt").write_text("x")
    with pytest.raises(BadFile, match=r"more.txt is not in the manifest"):
        checkpoint.check(last)
    (last / "more.txt").unlink()
    (last / "optimizer.safetensors").unlink()
    with pytest.raises(BadFile, match=r"optimizer.safetensors is missing"):
        checkpoint.check(last)


def test_a_folder_without_one_whole_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    given = values(write(tmp_path), report={"keep": 1})
    (train(given, tmp_path / "out") / "training.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"has no whole checkpoint: .*training.json: is not the file that was written"
    ):
        train(given, tmp_path / "out", resume="auto")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loop": {"accumulate": 3}}, r"data.batch=4 rows do not divide into 1 processes x loop.accumulate=3 pieces; nearest is 3"),
        ({"loop": {"carry_state": True}}, r"loop.carry_state needs states that do not grow; layer 0's grows"),
        ({"model": {"vocab": 100}}, r"model.vocab=100 is below the data's 259 tokens"),
        ({"model": {"dpth": 3}}, r"model: unknown config key 'dpth'; did you mean 'depth'"),
        ({"model": {"mixer": {"name": "mqb"}}}, r"unknown system 'mqb'"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_begin_says_why(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=message),
        begun(values(write(tmp_path), **sections), tmp_path / "out"),
    ):
        pass


def test_a_carried_state_reads_on_over_the_segments(tmp_path: Path) -> None:
    ring = {"name": "local_mqa", "heads": 2, "pattern": {"name": "window", "window": 24}}
    given = values(
        write(tmp_path),
        model={"mixer": ring, "depth": 1, "stack": {"name": "residual"}},
        loop={"carry_state": True},
    )
    with begun(given, tmp_path / "out") as trainer:
        objective = trainer.objective.eval()
        state, losses = trainer.model.init_state(4), []  # type: ignore[union-attr]
        for step in range(3):
            sums, state = objective(trainer.data.train(step), state)
            losses.append(sums.nll.item())
        batches = [trainer.data.train(step) for step in range(3)]
        joined = batches[0]._replace(
            tokens=torch.cat([b.tokens for b in batches], 1), target=torch.cat([b.target for b in batches], 1)
        )
        assert sum(losses) == pytest.approx(objective(joined)[0].nll.item(), rel=1e-5)
        assert losses[1] != pytest.approx(objective(batches[1])[0].nll.item(), rel=1e-5)
        kept = carry.kept([state])
        (again,) = carry.remade(trainer.model, kept, 4, 16, 3)  # type: ignore[arg-type]
        one, other = (objective(trainer.data.train(3), s)[0].nll for s in (state, again))
        assert one == other
        with pytest.raises(ValueError, match="the carried state has"):
            carry.remade(trainer.model, kept, 3, 16, 3)  # type: ignore[arg-type]


def test_a_dry_run_counts_what_a_run_takes(tmp_path: Path) -> None:
    run = RunConfig.from_dict(values(write(tmp_path)))
    found = estimate(run)
    with begun(values(write(tmp_path)), tmp_path / "out") as trainer:
        size = sum(p.numel() for p in trainer.model.parameters())
    assert (found.parameters, found.fixed_bytes, found.tokens) == (size, 16 * size, 64)
    assert found.flops > 6 * 64 * size
    assert found.activation_bytes > 64 * 16 * 4 * 10
    assert found.step_s > 0
    assert found.epochs == pytest.approx(6 * 64 / (len(TEXT) * 0.95), rel=0.05)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_dry_run_carries_states_as_the_run_does(tmp_path: Path) -> None:
    mixer = {"name": "mqa", "heads": 2, "pattern": {"name": "window", "window": 24}}
    for carried in (False, True):
        given = values(write(tmp_path), model={"mixer": mixer}, loop={"carry_state": carried})
        with begun(given, tmp_path / f"out-{carried}") as trainer:
            passes = _passes(trainer.objective, trainer.data.train(0), carried)
            first, later = (_kept(trainer.objective, passes) for _ in range(2))
        assert (later > first) is carried


def test_a_run_is_written_down_whole(tmp_path: Path) -> None:
    given = values(write(tmp_path))
    train(given, tmp_path / "out")
    assert (tmp_path / "out" / "run.yaml").read_text() == to_yaml(RunConfig.from_dict(given))


def test_tensorboard_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from writehead.train import report

    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package tensorboard: pip install tensorboard"):
        train(values(write(tmp_path), report={"tensorboard": True}), tmp_path / "out")


def test_tensorboard_files_hold_the_losses(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra train"
    )
    train(values(write(tmp_path), report={"tensorboard": True}), tmp_path / "out")
    events = reader.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_compiled_layers_learn_the_same(tmp_path: Path) -> None:
    given = values(write(tmp_path), report={"sample": None})
    losses = []
    for compiled in (False, True):
        given["loop"] = {"steps": 6, "compile": compiled}
        train(given, tmp_path / str(compiled))
        losses.append([line["train/loss"] for line in log(tmp_path / str(compiled)) if "train/loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
