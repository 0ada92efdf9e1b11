"""A run's description is strict: every mistake names the key, what is accepted, and the nearest."""

from pathlib import Path
from typing import Any

import pytest

from writehead.train.config import RunConfig
from writehead.train.values import override, read_values


def test_a_run_comes_back_from_its_plain_values() -> None:
    values = override(
        RunConfig().to_dict(), ["optim.betas=[0.9,0.99]", "loss.aux={balance_loss: 0.01}", "seed=3"]
    )
    run = RunConfig.from_dict(values)
    assert run.optim.betas == (0.9, 0.99)
    assert run.loss.aux == {"balance_loss": 0.01}
    assert RunConfig.from_dict(run.to_dict()) == run


def test_overrides_are_yaml_and_reach_into_sections() -> None:
    given = [
        "optim.lr=3e-4",
        "model.mixer.heads=8",
        "data.train=a.txt",
        "report.sample=null",
        "loop.compile=true",
    ]
    run = RunConfig.from_dict(override(RunConfig().to_dict(), given))
    assert run.optim.lr == 3e-4
    assert run.model["mixer"] == {"name": "mqa", "heads": 8}
    assert run.data.train == ("a.txt",)
    assert (run.report.sample, run.loop.compile) == (None, True)


def test_overrides_leave_what_they_start_from_alone() -> None:
    values = RunConfig().to_dict()
    override(values, ["model.mixer.heads=8"])
    assert values == RunConfig().to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["optm.lr=1"], r"unknown key 'optm'; did you mean 'optim'\? \(accepted: data, loop, loss, masks, model, optim"),
        (["optim.lrr=1"], r"unknown key of optim 'lrr'; did you mean 'lr'\?"),
        (["optim.lr=fast"], "optim.lr must be a number; got 'fast'"),
        (["optim.lr=-1"], "optim.lr=-1 must be at least 0"),
        (["optim.lr=.nan"], "optim.lr=nan must be at least 0"),
        (["loop.steps=true"], "loop.steps must be a whole number; got True"),
        (["loop.steps=0"], "loop.steps=0 must be at least 1"),
        (["loop.steps=1.5"], "loop.steps must be a whole number; got 1.5"),
        (["loop.compile=1"], "loop.compile must be true or false; got 1"),
        (["loop.precision=float16"], "unknown loop.precision 'float16'; did you mean 'bfloat16'"),
        (["loop.strategy=dp"], "unknown loop.strategy 'dp'; did you mean 'ddp'"),
        (["optim.name=adam"], "unknown optim.name 'adam'; did you mean 'adamw'"),
        (["optim.schedule=cos"], "unknown optim.schedule 'cos'"),
        (["optim.name=adafactor", "optim.eps=1e-8"], "optim.betas and optim.eps belong to adamw; got name='adafactor'"),
        (["optim.betas=[0.9]"], r"optim.betas=\[0.9\] must be two numbers from 0 up to 1"),
        (["optim.final=2"], "optim.final=2 must be a share from 0 to 1"),
        (["optim.schedule=inverse_sqrt", "optim.warmup=0"], "needs optim.warmup of at least 1; got 0"),
        (["loss.label_smoothing=1"], "loss.label_smoothing=1 must be from 0 up to 1"),
        (["loss.aux={a_loss: x}"], "loss.aux.a_loss must be a number; got 'x'"),
        (["data.kind=audio"], "unknown data.kind 'audio'"),
        (["data.kind=parallel"], "data.kind='parallel' trains a model of kind seq2seq; got model.kind='decoder'"),
        (["data.train=[]"], "data.train is empty; give files, folders or 'stdlib'"),
        (["data.holdout=1"], "data.holdout=1 must be a share between 0 and 1"),
        (["data.fields=[a,b]"], r"data.fields must name 1 of each line; got \['a', 'b'\]"),
        (["data.batch=x"], "data.batch must be a whole number; got 'x'"),
        (["data.train=3"], "data.train must be a list; got 3"),
        (["data=3"], "data must be keys and values; got 3"),
        (["report.keep=0"], "report.keep=0 must be at least 1"),
        (["seed=-1"], "seed=-1 must be a whole number from 0"),
        (["optim.lr"], "'optim.lr' is no override; write key=value"),
        (["seed.x=1"], "'seed.x=1': seed holds 0, not keys"),
        (["seed=[1"], r"'seed=\[1': the value is not YAML"),
        (["data.kind=labelled", "loop.carry_state=true"], "loop.carry_state is for data.kind='text'; got 'labelled'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(override(RunConfig().to_dict(), given))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"- 1\n- 2\n", "a run is a mapping of keys to values; got list"),
        (b"", "a run is a mapping of keys to values; got NoneType"),
        (b"a: [1\n", "run.yaml: while parsing"),
        (b"\xff\xfe\x00", "is not text; give a run as YAML"),
    ],
)
def test_a_file_that_is_no_run_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_values(path)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_values(path)


def test_a_section_of_plain_values_says_all_defaults() -> None:
    values: dict[str, Any] = RunConfig().to_dict()
    assert values["optim"]["warmup"] == RunConfig().optim.warmup
    assert set(values) == {"seed", "model", "data", "masks", "loss", "optim", "loop", "report"}
