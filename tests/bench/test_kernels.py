"""The figures of `bench kernels`, and that it measures every format on every cell."""

import json

import pytest
from typer.testing import CliRunner

from writehead.bench import kernels
from writehead.bench.measure import Sample, Timing
from writehead.cli.bench import command
from writehead.native import library


def row(**changes) -> kernels.Row:
    """A product that takes 2 ms."""
    facts = {"name": "native int8", "n": 100, "k": 500, "rows": 4, "weight_bytes": 10**7, "bandwidth": 1e10}
    return kernels.Row(**facts | changes, timing=Timing.of([Sample(2e-3, 0.0)]))


def test_a_product_states_its_rate_and_its_share_of_the_bandwidth():
    assert row().rate == pytest.approx(2 * 4 * 100 * 500 / 2e-3)
    assert row().share == pytest.approx(0.5)  # 10 MB at 10 GB/s take 1 ms of its 2


def test_every_format_is_measured_beside_pytorch():
    if library.library()[0] is None:
        pytest.skip(library.library()[1])
    found = kernels.measure(((64, 96),), (1, 17), threads=1, rounds=1, working_set=2**15)
    few = [each.name for each in found if each.rows == 1]
    assert few == ["native float32", "native bfloat16", "native int8", "native int4", "torch float32"]
    assert [each.name for each in found if each.rows == 17] == [*few, "torch int8"]
    assert all(each.timing.n == 1 and each.rate > 0 for each in found)
    sizes = {each.name: each.weight_bytes for each in found}
    assert sizes["native int8"] == 64 * 96 + 64 * 3 * 2  # a byte for each weight, two for each group of 32


def test_without_a_library_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: (None, "no native library was built"))
    with pytest.raises(kernels.NoEngine, match="no native library was built"):
        kernels.measure(threads=1)


def test_the_command_prints_one_json_object(monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda **options: [row(rows=count) for count in options["rows"]])
    result = CliRunner().invoke(
        command, ["kernels", "--part", "products", "--rows", "3", "--rows", "5", "--threads", "1", "--json"]
    )
    assert result.exit_code == 0
    assert [each["rows"] for each in json.loads(result.stdout)["products"]] == [3, 5]


def test_the_command_prints_a_table(monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda **options: [row()])
    result = CliRunner().invoke(command, ["kernels", "--part", "products"])
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("100 x 500", "native int8", "2000", "5.0", "50%"))


def test_what_is_kept_has_a_plot_of_its_rates(monkeypatch, tmp_path):
    found = [row(rows=count, name=name) for name in ("native int8", "torch int8") for count in (1, 4)]
    monkeypatch.setattr(kernels, "measure", lambda **options: found)
    assert (
        CliRunner().invoke(command, ["kernels", "--part", "products", "--out", str(tmp_path)]).exit_code == 0
    )
    assert len(json.loads((tmp_path / "kernels.json").read_text())["results"]) == 4
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
