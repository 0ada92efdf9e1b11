"""Two processes (gloo) with DDP and with FSDP2 train as one process does that takes their rows in two pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small import log, tensors, train, values, write
from tests.train.test_resume import ENCODER, LABELLED, PAIRS
from tests.train.two_processes import launch

SEQ2SEQ = {
    **ENCODER,
    "kind": "seq2seq",
    "mixer": {"name": "mqa", "heads": 2},
    "encoder": ENCODER,
    "cross": {"name": "cross", "heads": 2, "kv_heads": 1},
}


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """A run of each kind of data, with dropout."""
    pairs = write(folder, "pairs.tsv", PAIRS)
    labelled = write(folder, "labelled.tsv", LABELLED)
    return {
        "text": values(write(folder)),
        "labelled": values(labelled, data={"kind": "labelled", "length": 40, "batch": 4})
        | {"model": ENCODER},
        "parallel": values(pairs, data={"kind": "parallel", "length": 40, "batch": 4}) | {"model": SEQ2SEQ},
    }


def with_loop(run: dict[str, Any], **loop: Any) -> dict[str, Any]:
    return {**run, "loop": {**run["loop"], **loop}}


@pytest.mark.slow
def test_two_processes_give_the_losses_gradients_and_weights_of_one(tmp_path: Path) -> None:
    jobs, wanted = [], {}
    for kind, run in runs(tmp_path).items():
        wanted[kind] = train(with_loop(run, accumulate=2), tmp_path / f"{kind}-one")
        for strategy in ("ddp", "fsdp"):
            out = str(tmp_path / f"{kind}-{strategy}")
            jobs.append({"run": with_loop(run, strategy=strategy), "out": out, "resume": "never"})
    # a run of one process goes on in two
    source = str(wanted["text"].parent / "checkpoint-00000002")
    moved = with_loop(runs(tmp_path)["text"], strategy="fsdp")
    jobs.append({"run": moved, "out": str(tmp_path / "text-moved"), "resume": source})
    launch(jobs, tmp_path)
    for kind, one in wanted.items():
        for other in ("ddp", "fsdp", *(["moved"] if kind == "text" else [])):
            assert_close(tmp_path / f"{kind}-one", tmp_path / f"{kind}-{other}", one.name)


def assert_close(one: Path, other: Path, name: str) -> None:
    """Losses, gradient norms and every tensor agree to what float32 sums in another order may differ by."""
    ours, theirs = log(one), log(other)
    theirs = theirs if len(theirs) == len(ours) else [None] * (len(ours) - len(theirs)) + theirs
    for a, b in zip(ours, theirs, strict=True):
        if b is None or "train/loss" not in a:
            continue
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
    mine, yours = tensors(one / name), tensors(other / name)
    assert mine.keys() == yours.keys()
    for key, tensor in mine.items():
        if key.startswith("model/"):
            torch.testing.assert_close(yours[key], tensor, rtol=1e-3, atol=2e-4)
