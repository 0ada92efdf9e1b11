"""The catalog: every row loads, builds and is told apart; what `build` refuses it says."""

import inspect
import re

import pytest
import torch

from writehead.catalog import FEEDFORWARDS, MIXERS, PIXELS, POSITIONS, STACKS, argument, build, find, load
from writehead.core.pattern import Causal, Full, Leading, Window
from writehead.core.positions import Positions
from writehead.laws import build_tiny

TABLES = {
    "mixers": MIXERS,
    "feedforwards": FEEDFORWARDS,
    "positions": POSITIONS,
    "stacks": STACKS,
    "pixels": PIXELS,
}
ROWS = [pytest.param(table, row, id=row.name) for table in TABLES.values() for row in table.values()]


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_a_row_is_named_by_its_key_loads_and_says_what_it_is(table, row):
    assert table[row.name] is row
    assert inspect.isclass(load(row))
    assert set(row.preset) <= set(inspect.signature(load(row)).parameters)
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", row.paper)
    assert re.fullmatch(r"O\(.+\)|encode", row.decodes)
    assert re.fullmatch(r"O\(.+\)", row.cost)
    assert row.summary
    assert not row.summary.endswith(".")


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_builds_and_runs_at_a_tiny_size(name):
    mixer, x, pos = (
        build_tiny(MIXERS[name], {"name": "rotary"}),
        torch.randn(2, 5, 16),
        Positions.range(2, 0, 5),
    )
    if MIXERS[name].decodes == "encode":
        y = mixer.encode(x, pos)[0]
    else:
        y = mixer(x, pos, mixer.remember(x, pos) if name == "cross" else None)[0]
    assert bool(y.isfinite().all())
    assert float(y.std()) > 1e-3


def test_rows_of_one_class_differ_by_their_presets():
    rows = [name for name, row in MIXERS.items() if row.target == "mixers.softmax:Softmax"]
    patterns = {name: build_tiny(MIXERS[name], {"name": "none"}).pattern for name in rows}
    assert patterns["local_mqa"] == patterns["local_mha"] == Window(6)
    assert patterns["sink_mqa"] == Causal() & (Window(6) | Leading(4))
    assert patterns["bidirectional"] == Full()
    shared = {name: build_tiny(MIXERS[name], {"name": "none"}).qkv.kv_heads for name in rows}
    assert {name: shared[name] for name in ("mha", "gqa", "mqa", "local_mqa")} == {
        "mha": 4, "gqa": 2, "mqa": 1, "local_mqa": 1,
    }  # fmt: skip


def test_arguments_go_over_the_preset_and_context_fills_what_is_taken():
    mixer = build(MIXERS, {"name": "mqa", "heads": 4, "kv_heads": 2}, dim=16, nonsense=3)
    assert (mixer.qkv.heads, mixer.qkv.kv_heads) == (4, 2)
    assert build(POSITIONS, {"name": "none"}, dim=16, heads=3) is not None


def test_argument_is_what_build_would_give():
    assert argument(MIXERS, {"name": "mqa"}, "kv_heads") == 1
    assert argument(MIXERS, {"name": "mqa", "kv_heads": 2}, "kv_heads") == 2
    assert argument(MIXERS, {"name": "mqa"}, "heads") == 8
    assert argument(MIXERS, {"name": "cross"}, "pattern") is None
    assert argument(POSITIONS, {"name": "learned"}, "max_context") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: find(MIXERS, "mqaa"),
            r"unknown system 'mqaa'; did you mean 'mqa'\? \(accepted: .*bidirectional, .*cross",
        ),
        (lambda: find(POSITIONS, "alibbi"), r"unknown name \(position\) 'alibbi'; did you mean 'alibi'"),
        (
            lambda: find(MIXERS, {"heads": 4}),
            r"a spec needs a name; got \{'heads': 4\} \(accepted: .*bidirectional",
        ),
        (
            lambda: build(MIXERS, {"name": "mqa", "kvheads": 4}, dim=16),
            r"mqa takes no argument 'kvheads'; did you mean 'kv_heads'\? \(accepted: bias, head_dim, heads",
        ),
        (lambda: build(MIXERS, {"name": "mqa", "dim": 3}, dim=16), "mqa takes no argument 'dim'"),
        (
            lambda: build(POSITIONS, {"name": "none", "x": 3}),
            r"none takes no argument 'x' \(accepted: none\)",
        ),
        (
            lambda: build(POSITIONS, {"name": "learned"}, dim=4),
            r"learned needs max_context; got \{'name': 'learned'\}",
        ),
        (lambda: build(MIXERS, {"name": "mqa", "heads": 2.0}, dim=16), "mqa: heads must be int; got 2.0"),
        (lambda: build(MIXERS, {"name": "mqa", "heads": True}, dim=16), "mqa: heads must be int; got True"),
        (
            lambda: build(MIXERS, {"name": "mqa", "scale": "1"}, dim=16),
            "mqa: scale must be float or nothing; got '1'",
        ),
        (
            lambda: build(MIXERS, {"name": "mqa", "pattern": 1}, dim=16),
            "mqa: pattern must be Pattern or Mapping; got 1",
        ),
        (
            lambda: build(POSITIONS, {"name": "alibi", "slopes_of_heads": 1}, heads=2),
            "alibi: slopes_of_heads must be list or nothing; got 1",
        ),
        (
            lambda: build(POSITIONS, {"name": "alibi", "slopes_of_heads": [1.0, "x"]}, heads=2),
            r"slopes_of_heads must be finite numbers; got \[1.0, 'x'\]",
        ),
        (
            lambda: argument(MIXERS, {"name": "mqa", "heads": []}, "heads"),
            r"mqa: heads must be int; got \[\]",
        ),
    ],
)
def test_what_the_catalog_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_tables_cannot_be_changed_by_importing_something():
    with pytest.raises(TypeError, match="does not support item assignment"):
        MIXERS["mine"] = MIXERS["mqa"]
