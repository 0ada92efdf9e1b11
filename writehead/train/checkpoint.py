"""Checkpoints: model folders with what a run needs to go on, written whole or not at all, checked when read.

checkpoint-00000100/   config.json model.safetensors tokenizer.json ...   what `writehead generate` opens
                       optimizer.safetensors state.safetensors training.json
                       manifest.json   SHA-256 of every other file
latest                 a link to the newest
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile
from writehead.convert.files import read_tensors, write_tensors
from writehead.convert.strict_json import read_json
from writehead.convert.tokenizer import Tokenizer
from writehead.convert.writing import replacing, whole_or_nothing, write_json

NAME = re.compile(r"checkpoint-(\d{8,})")
LATEST, MANIFEST, TRAINING = "latest", "manifest.json", "training.json"
PARTS = ("optimizer", "state")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: optimiser steps done.
        model: weights by name.
        optimizer: what `optim.state_of` gave.
        state: carried state, tensor by tensor.
        facts: plain values: data digest, running sums.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def path_of(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return out / f"checkpoint-{step:08}"


def write(out: Path, checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer | None) -> Path:
    """Write a checkpoint, whole or not at all, and point `latest` at it.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there stays as it was.
    """
    target = path_of(out, checkpoint.step)
    with whole_or_nothing(target, overwrite=True) as folder:
        write_tensors(folder, checkpoint.model)
        write_json(folder / "config.json", config.to_dict())
        if tokenizer is not None:
            tokenizer.save(folder)
        for part in PARTS:
            if tensors := getattr(checkpoint, part):
                _save(folder / f"{part}.safetensors", tensors)
        write_json(folder / TRAINING, {"step": checkpoint.step, **checkpoint.facts})
        files = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"sha256": files})
    _point(out / LATEST, target.name)
    return target


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        BadFile: a file is missing, added or changed since it was written.
    """
    check(path)
    facts = read_json(path / TRAINING)
    step = facts.pop("step", None)
    if not isinstance(step, int):
        raise BadFile(path / TRAINING, f"step is {step!r}; expected a whole number")
    parts = {
        part: dict(read_tensors(path / f"{part}.safetensors"))
        if (path / f"{part}.safetensors").exists()
        else {}
        for part in PARTS
    }
    return Checkpoint(step, dict(read_tensors(path)), parts["optimizer"], parts["state"], facts)


def check(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        BadFile: a file is missing, added or changed.
    """
    wanted = read_json(path / MANIFEST).get("sha256")
    if not isinstance(wanted, dict):
        raise BadFile(path / MANIFEST, "has no sha256 of files")
    there = {p.name for p in path.iterdir()} - {MANIFEST}
    for name in sorted(there ^ set(wanted)):
        raise BadFile(path, f"{name} is {'missing' if name in wanted else 'not in the manifest'}")
    for name, digest in wanted.items():
        if sha256(path / name) != digest:
            raise BadFile(path / name, "is not the file that was written: its SHA-256 differs")


def found(out: Path) -> list[Path]:
    """Checkpoints of a run, newest first, unchecked."""
    there = [p for p in out.glob("checkpoint-*") if NAME.fullmatch(p.name)] if out.is_dir() else []
    return sorted(there, key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def newest(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in found(out):
        try:
            check(path)
        except BadFile as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def keep_last(out: Path, count: int) -> None:
    """Remove all but the newest checkpoints; one that is being removed has another name first."""
    for path in found(out)[count:]:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=out))
        path.rename(aside)
        shutil.rmtree(aside)


def clear(out: Path) -> None:
    """Remove what a killed process left unfinished."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.old", f".{LATEST}.*"):
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sha256(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary)
        except SafetensorError as error:
            raise ValueError(f"{path.name} cannot be written: {error}") from error


def _point(link: Path, name: str) -> None:
    """Make or move a link in one step."""
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name, target_is_directory=True)
    temporary.replace(link)
