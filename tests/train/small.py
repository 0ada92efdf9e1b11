"""Small runs on a text made here: a few steps take a fraction of a second."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from writehead.train.config import RunConfig
from writehead.train.loop import Trainer
from writehead.train.start import begin

TEXT = "".join(f"line {n} of a text says {n * n % 97} and then {n % 7} more; " for n in range(400))


def write(folder: Path, name: str = "text.txt", text: str = TEXT) -> str:
    """A file of text; gives its path."""
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def values(text: str, **sections: Any) -> dict[str, Any]:
    """A run of six steps with dropout, as plain values; sections go over its own."""
    given: dict[str, Any] = {
        "model": {
            "dim": 16,
            "depth": 2,
            "mixer": {"name": "mqa", "heads": 2},
            "feedforward": {"name": "dense", "hidden": 24},
            "stack": {"name": "residual", "dropout": 0.1},
        },
        "data": {"train": [text], "length": 16, "batch": 4},
        "optim": {"warmup": 2, "lr": 0.01},
        "loop": {"steps": 6},
        "report": {"log_every": 2, "eval_every": 3, "save_every": 2, "eval_batches": 2, "sample_tokens": 4},
    }
    for name, section in sections.items():
        given[name] = {**given.get(name, {}), **section} if isinstance(section, dict) else section
    return given


@contextmanager
def begun(given: dict[str, Any], out: Path, **arguments: Any) -> Iterator[Trainer]:
    """The run that values describe, begun."""
    with begin(RunConfig.from_dict(given), out, device="cpu", **arguments) as trainer:
        yield trainer


def train(given: dict[str, Any], out: Path, **arguments: Any) -> Path:
    """Train to the end; gives the last checkpoint."""
    with begun(given, out, **arguments) as trainer:
        return trainer.train()


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds in tensors, by file and name."""
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits."""
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def log(out: Path) -> list[dict[str, Any]]:
    """The log's lines without what time and memory decide."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_bytes")} for line in lines
    ]
