"""How a run begins: its folder, its data, its model, and the checkpoint that it goes on from."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from writehead.catalog import MIXERS, argument, find, load
from writehead.config import ModelConfig
from writehead.convert.writing import replacing
from writehead.model.blank import KINDS
from writehead.model.decoder import Decoder
from writehead.model.pixels import frame_of
from writehead.model.seq2seq import Seq2Seq
from writehead.train import carry, checkpoint
from writehead.train.config import RunConfig
from writehead.train.corpus import files
from writehead.train.data import Data, prepare, prepare_images
from writehead.train.loop import Meter, Trainer
from writehead.train.objective import Model, Objective, load_into, recompute
from writehead.train.optim import make_optimizer, restore
from writehead.train.order import mix
from writehead.train.parallel import Team, like
from writehead.train.report import Reporter
from writehead.train.tokens import digest

RUN, DATA, LOCK = "run.yaml", "data", ".lock"
FREE = (
    "loop.steps",
    "loop.accumulate",
    "loop.strategy",
    "loop.recompute",
    "loss.chunk",
)  # a run may go on with others


class Busy(ValueError):
    """Another process trains into the folder."""


@contextmanager
def begin(
    run: RunConfig, out: Path, *, resume: str = "never", device: str | None = None
) -> Iterator[Trainer]:
    """A run that is ready for its next step; the folder is its own meanwhile.

    Args:
        run: the whole description.
        out: the run's folder; made if it is not there.
        resume: "never"; "auto", which goes on from the newest whole checkpoint of `out` if there is one; or
            the path of a checkpoint.
        device: of torch; default a GPU if there is one.

    Raises:
        ValueError: a folder with a run that was not to be resumed, a run that differs from the one it
            should continue, or data and models that cannot be had.
    """
    team = Team(run.loop.strategy, device)
    try:
        if team.first:
            out.mkdir(parents=True, exist_ok=True)
        team.wait()
        with _locked(out, team.first):
            yield _begin(run, out, resume, team)
    finally:
        team.leave()


def _begin(run: RunConfig, out: Path, resume: str, team: Team) -> Trainer:
    _check_split(run, team)
    if team.first:
        checkpoint.clear(out)
    source, problems = _source(out, resume)
    start = None if source is None else checkpoint.read(source)
    if start is not None:
        _check_same(run, start.facts.get("run"), cast(Path, source))
    data = _data(run, out, team)
    if start is not None and start.facts.get("data") != data.digest:
        raise ValueError(
            f"the data is not what {source} was trained on; restore it, or start in a new folder"
        )
    config = model_config(run, data)
    model = fresh_model(run, config)
    if start is not None:
        load_into(model, start.model)
    objective = Objective(model.to(team.device), run.loss, data.choices)
    if run.loop.recompute:
        recompute(model)
    if run.loop.compile:
        _compile(model)
    wrapped = team.wrap(objective)
    optimizer = make_optimizer(model.named_parameters(), run.optim)
    step = 0 if start is None else start.step
    if team.first:
        _write_run(out, run)
    report = run.report
    reporter = Reporter(out, run.loop.steps, step, tensorboard=report.tensorboard, silent=not team.first)
    trainer = Trainer(run, out, team, data, config, objective, wrapped, optimizer, reporter, step)
    for line in (*problems, *data.notes):
        reporter.say(f"warning: {line}")
    if start is not None:
        restore(optimizer, model.named_parameters(), start.optimizer, like)
        trainer.saved, trainer.meter = source, _meter(start.facts)
        trainer.states = _states(trainer, start)
        reporter.say(f"resumed from {source}")
    return trainer


def model_config(run: RunConfig, data: Data) -> ModelConfig:
    """The run's model with the tokenizer's vocabulary.

    Raises:
        ValueError: a model config that is refused, or one whose vocabulary is too small.
    """
    values = dict(run.model)
    least = data.least_vocab
    for part in (values, values.get("encoder")):
        if isinstance(part, Mapping) and part.get("vocab", least) < least:
            raise ValueError(f"model.vocab={part['vocab']} is below the data's {least} tokens")
    values.setdefault("vocab", least)
    if isinstance(values.get("encoder"), Mapping):
        values["encoder"] = {"vocab": values["vocab"], **values["encoder"]}
    if run.data.kind != "parallel" and not run.loop.carry_state:
        length = run.data.length if run.data.kind != "image" else frame_of(values["pixels"]).length
        values.setdefault("max_context", length + run.masks.summaries)
    try:
        config = ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    _check_summaries(config, run.masks.summaries)
    return config


def _check_summaries(config: ModelConfig, summaries: int) -> None:
    """Raise unless a mixer that reads owners has as many global tokens as rows have summaries."""
    for index in range(config.depth if summaries else 0):
        spec = config.layer("mixer", index)
        row, tokens = find(MIXERS, spec), argument(MIXERS, spec, "tokens")
        if "owners" in getattr(load(row), "reads", ()) and tokens != summaries:
            raise ValueError(f"masks.summaries={summaries} must be the mixer {row.name}'s tokens={tokens}")


def fresh_model(run: RunConfig, config: ModelConfig) -> Model:
    """The model with weights that the seed gives.

    Raises:
        ValueError: a config whose parts do not fit together, or a state that cannot be carried.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(run.seed, 4))
        model = cast(Model, KINDS[config.kind](config))
    if run.loop.carry_state:
        assert isinstance(model, Decoder)
        carry.check_bounded(model)
    return model


def _check_split(run: RunConfig, team: Team) -> None:
    pieces = team.world * run.loop.accumulate
    if run.data.batch % pieces:
        near = max(1, round(run.data.batch / pieces)) * pieces
        raise ValueError(
            f"data.batch={run.data.batch} rows do not divide into {team.world} processes x "
            f"loop.accumulate={run.loop.accumulate} pieces; nearest is {near}"
        )
    if run.loop.carry_state and team.world > 1:
        raise ValueError("loop.carry_state is for one process; torchrun started several")
    if run.optim.name != "adamw" and run.loop.strategy == "fsdp" and team.world > 1:
        raise ValueError(f"loop.strategy='fsdp' is for optim.name='adamw'; got {run.optim.name!r}")


def _source(out: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is wrong with newer ones."""
    there = checkpoint.found(out)
    if resume == "never":
        if there:
            raise ValueError(
                f"{out} holds a run at step {int(there[0].name.partition('-')[2])}; continue it with "
                "--resume auto, or choose another folder"
            )
        return None, []
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise ValueError(
                f"there is no checkpoint {path} (accepted: never, auto, or a checkpoint's folder)"
            )
        return path.resolve(), []
    found, problems = checkpoint.newest(out)
    if there and found is None:
        raise ValueError(f"{out} has no whole checkpoint: {problems[0]}")
    return found, problems


def _check_same(run: RunConfig, other: Any, source: Path) -> None:
    """Raise unless a run is the one that a checkpoint is of; its end and its reports may differ."""
    ours = _flat(run.to_dict())
    since = {key: value for key, value in _flat(RunConfig().to_dict()).items() if key in ours}
    theirs = since | _flat(
        other if isinstance(other, dict) else {}
    )  # options that came later: their defaults
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in FREE and not key.startswith("report.") and ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{source.name} was made with {key}={theirs.get(key)!r}; got {ours.get(key)!r} (only "
                f"{', '.join(FREE)} and report may change)"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _data(run: RunConfig, out: Path, team: Team) -> Data:
    """The run's data; the first process encodes, the others read what it wrote."""
    if run.data.kind == "image":
        return read_data(run, out)
    stats = [
        (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files((*run.data.train, *run.data.valid))
    ]
    key = digest({k: v for k, v in run.to_dict()["data"].items() if k not in ("length", "batch")}, stats)
    folder = out / DATA / key[:16]
    if team.first:
        folder.mkdir(parents=True, exist_ok=True)
        data = read_data(run, folder)
        team.wait()
        return data
    team.wait()
    return read_data(run, folder)


def read_data(run: RunConfig, folder: Path) -> Data:
    """The data of a run, of which `folder` keeps what is dear to make.

    Raises:
        ValueError: data that is missing, malformed or too short.
    """
    if run.data.kind == "image":
        return prepare_images(run.data, run.model["pixels"], run.seed)
    return prepare(run.data, folder, run.seed, run.loop.carry_state, run.masks)


def _meter(facts: Mapping[str, Any]) -> Meter:
    nll, targets, right = facts["meter"]
    return Meter(nll, targets, right)


def _states(trainer: Trainer, start: checkpoint.Checkpoint) -> list[Any]:
    if not start.state:
        return []
    data, run, model = trainer.data.train, trainer.run, trainer.model
    assert isinstance(model, Decoder)
    segments = (start.step - 1) % data.count + 1
    return carry.remade(model, start.state, run.data.batch // run.loop.accumulate, run.data.length, segments)


def _compile(model: Model) -> None:
    for half in (model.encoder, model.decoder) if isinstance(model, Seq2Seq) else (model,):
        for block in cast(Any, half.stack).blocks:
            for part in (block.feedforward, getattr(block.mixer, "qkv", None)):
                if isinstance(part, torch.nn.Module):
                    part.compile(dynamic=True)


def _write_run(out: Path, run: RunConfig) -> None:
    with replacing(out / RUN) as temporary:
        temporary.write_text(to_yaml(run), encoding="utf-8")


def to_yaml(run: RunConfig) -> str:
    """The whole run as YAML."""
    return yaml.safe_dump(run.to_dict(), sort_keys=False, allow_unicode=True)


@contextmanager
def _locked(out: Path, first: bool) -> Iterator[None]:
    """Hold the folder against a second run.

    Raises:
        Busy: another process trains into it.
    """
    if not first or os.name != "posix":
        yield
        return
    import fcntl

    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is training into {out}") from None
        yield
