"""The figures of `bench kernels` for one token's attention, and that it measures every format and shape."""

import json

import pytest
import torch
from typer.testing import CliRunner

from writehead.bench import kernels, one_token
from writehead.bench.measure import Sample, Timing
from writehead.cli.bench import command
from writehead.native import library


def row(**changes) -> one_token.Row:
    """Attention to 1000 keys of one head in float32 that takes 100 us: 512 kB, 4 million operations."""
    facts = {"stored": "float32", "kv_heads": 1, "context": 1000, "batch": 1, "read_bytes": 512_000}
    limits = {"bandwidth": 1e10, "peak": 2e11}
    return one_token.Row(**facts | limits | changes, timing=Timing.of([Sample(1e-4, 0.0)]))


def test_the_roofline_is_the_larger_of_reading_and_summing():
    assert (row().roof_s, row().bound) == (pytest.approx(51.2e-6), "memory")
    slow = row(peak=5e10)
    assert (slow.roof_s, slow.bound) == (pytest.approx(4 * 16 * 64 * 1000 / 5e10), "sums")
    assert row().share == pytest.approx(0.512)


def test_every_format_and_shape_is_measured():
    if library.library()[0] is None:
        pytest.skip(library.library()[1])
    found = one_token.measure(
        threads=1, rounds=1, kv_heads=(1, 4), contexts=(32,), batches=(2,), working_set=2**16
    )
    assert [(r.stored, r.kv_heads) for r in found] == [
        (stored, heads) for heads in (1, 4) for stored in ("float32", "bfloat16", "int8")
    ]
    sizes = [r.read_bytes for r in found[:3]]
    assert sizes == [2 * 32 * 2 * 64 * 4, 2 * 32 * 2 * 64 * 2, 2 * 32 * (2 * 64 + 2 * 4)]
    assert all(r.timing.n == 1 and r.share > 0 for r in found)


def test_what_is_measured_is_attention_to_the_whole_cache():
    if library.library()[0] is None:
        pytest.skip(library.library()[1])
    held = one_token._Layers("float32", 4, 48, 2, 2**19)
    with kernels.team(1) as (engine, helpers):
        assert held._attend(engine, helpers) == held.layers == 3
    for layer, y in enumerate(held.y):
        k = held.k.view(2, -1, 4, 3, 64, 16)[:, layer].transpose(-1, -2).flatten(2, 3)
        k, v = (t.repeat_interleave(4, 1) for t in (k, held.v[:, layer]))
        weights = (torch.einsum("bthd,bhsd->bhts", held.q, k) / 8).softmax(-1)
        torch.testing.assert_close(y, torch.einsum("bhts,bhsd->bthd", weights, v), atol=1e-5, rtol=0)


def test_layers_that_are_too_large_are_left_out(monkeypatch):
    if library.library()[0] is None:
        pytest.skip(library.library()[1])
    monkeypatch.setattr(one_token, "LARGEST", 32 * 128 * 2)
    found = one_token.measure(
        threads=1, rounds=1, kv_heads=(1,), contexts=(32,), batches=(1,), working_set=2**16
    )
    assert [r.stored for r in found] == ["bfloat16", "int8"]


def test_the_command_measures_attention_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "measure", None)
    monkeypatch.setattr(one_token, "measure", lambda **options: [row()])
    given = ["kernels", "--part", "attention", "--threads", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(command, given)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("1 of 16 heads", "float32", "100", "5.1", "51%", "memory"))
    kept = json.loads((tmp_path / "kernels-attention.json").read_text())
    assert kept["results"][0]["roof_s"] == pytest.approx(51.2e-6)
    printed = CliRunner().invoke(command, ["kernels", "--part", "attention", "--json"])
    assert json.loads(printed.stdout)["attention"][0]["bound"] == "memory"
