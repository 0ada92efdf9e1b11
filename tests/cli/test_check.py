"""`writehead check`: verdicts on the catalog and on mixers of the user's own."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from writehead.catalog import MIXERS
from writehead.cli import app, check
from writehead.laws import DECODING, ENCODING, Verdict

run = CliRunner().invoke
OWN = '''
from torch import nn


class Sum(nn.Module):
    """y_t = W (x_0 + ... + x_t)."""

    def __init__(self, dim, scale=1.0):
        super().__init__()
        self.dim, self.scale, self.weight = dim, scale, nn.Linear(dim, dim)

    def init_state(self, batch, like, store=None):
        return like.new_zeros(batch, self.dim)

    def state_bytes(self, batch, context, itemsize, store=None):
        return batch * self.dim * itemsize

    def forward(self, x, pos, state=None):
        state = self.init_state(len(x), x) if state is None else state
        y = state[:, None] + self.order(x * pos.valid[..., None] * self.scale)
        return self.weight(y), y[:, -1], {}

    def order(self, x):
        return x.cumsum(1)


class Backwards(Sum):
    """Reads what comes after."""

    def order(self, x):
        return x.flip(1).cumsum(1).flip(1)


class Nothing:
    pass
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_mixers.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_mixers", None)


@pytest.mark.slow
def test_a_lawful_mixer_of_ones_own_holds_every_law(here: None) -> None:
    done = run(app, ["check", "--module", "own_mixers:Sum", "--set", "scale=0.5", "--json"])
    verdicts = json.loads(done.stdout)
    assert done.exit_code == 0
    assert [v["law"] for v in verdicts] == list(DECODING)
    assert all(v["passed"] and v["row"] == "Sum" for v in verdicts)
    assert all(v["deviation"] <= 1e-9 for v in verdicts)


@pytest.mark.slow
def test_a_mixer_that_reads_the_future_breaks_the_causal_law_and_the_exit_code(here: None) -> None:
    done = run(app, ["check", "--module", "own_mixers:Backwards", "--set", "dim=8"])
    assert done.exit_code == 1
    line = next(line.split() for line in done.stdout.splitlines() if "causal" in line)
    assert line[:2] == ["BROKEN", "causal"]
    assert float(line[2]) > 1e-3
    assert "laws hold; the figure is the worst deviation" in done.stdout


@pytest.mark.slow
def test_a_system_of_the_catalog_is_checked_by_name() -> None:
    done = run(app, ["check", "bidirectional"])
    assert done.exit_code == 0
    for law in ENCODING:
        assert f"holds   {law}" in done.stdout
    assert f"{len(ENCODING)} of {len(ENCODING)} laws hold" in done.stdout


def test_all_goes_through_the_whole_catalog_and_one_failure_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_row(row: object) -> list[Verdict]:
        name = row.name  # type: ignore[attr-defined]
        return [Verdict(name, "split", name != "gqa", None if name == "gqa" else 1e-15, "what deviated")]

    monkeypatch.setattr("writehead.laws.check_row", check_row)
    done = run(app, ["check", "--all"])
    assert done.exit_code == 1
    assert [line for line in done.stdout.splitlines() if line in MIXERS] == list(MIXERS)
    assert "  BROKEN  split                  -\n          what deviated\n" in done.stdout
    assert f"{len(MIXERS) - 1} of {len(MIXERS)} laws hold" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of NAME, --all and --module PKG.MOD:CLASS"),
        (["mqa", "--all"], 2, "give one of NAME, --all and --module PKG.MOD:CLASS"),
        (["mqa", "--set", "dim=8"], 2, "--set is for --module"),
        (["mqaa"], 1, "unknown system 'mqaa'; did you mean 'mqa'?"),
        (["--module", "own_mixers"], 2, "--module takes PKG.MOD:CLASS; got 'own_mixers'"),
        (["--module", "own_mixer:Sum"], 1, "cannot import own_mixer: ModuleNotFoundError: No module named"),
        (["--module", "own_broken:Sum"], 1, "cannot import own_broken: SyntaxError: "),
        (["--module", "own_mixers:Sun"], 1, "own_mixers has no class 'Sun' (it has Sum, Backwards, Nothing)"),
        (
            ["--module", "own_mixers:Sum", "--set", "dm=8"],
            1,
            "unexpected keyword argument 'dm' (it takes dim, scale",
        ),
        (
            ["--module", "own_mixers:Nothing"],
            1,
            "Nothing is no mixer: it has neither init_state and forward, nor",
        ),
    ],
)
def test_check_refuses_in_one_line(here: None, arguments: list[str], code: int, message: str) -> None:
    done = run(app, ["check", *arguments])
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_is_checked_when_the_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ours", lambda name: pytest.fail("checked"))
    assert run(app, ["check", "mqa", "--all"]).exit_code == 2
