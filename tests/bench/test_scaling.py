"""Slopes, and that every subject is measured in a process of its own."""

import math

import pytest
import torch
from typer.testing import CliRunner

from writehead.bench.scaling import SUBJECTS, Growth, measure, scaling_plot, slope, slopes
from writehead.catalog import MIXERS, build
from writehead.cli.bench import command


def test_the_slope_of_a_power_is_its_exponent():
    points = [(math.log(n), math.log(3 * n**1.5)) for n in (16, 64, 1024)]
    assert slope(points) == pytest.approx(1.5)
    assert math.isnan(slope(points[:1]))
    assert math.isnan(slope([]))


def test_slopes_leave_failed_cells_out_and_stand_beside_theory():
    cells = [Growth("window", n, n * 1e-6, 3e-6 * n, 100 * n) for n in (1024, 4096)]
    cells += [Growth("window", 8192, error="no memory"), Growth("dense", 1024, 1.0, 2.0, 7)]
    found = slopes(cells)
    assert found["window"] == pytest.approx({"theory": 1, "forward_s": 1, "both_s": 1, "peak_bytes": 1})
    assert found["dense"]["theory"] == 2
    assert math.isnan(found["dense"]["both_s"])


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_builds_and_has_figures(name):
    assert build(MIXERS, {**SUBJECTS[name].spec(4096), "heads": 2}, dim=16, position=None) is not None
    forward, both, peak = measure(name, 300, 2, 8, torch.get_num_threads(), 1)
    assert 0 < forward < both
    assert peak >= 0


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own_and_writes_record_and_plot(tmp_path):
    arguments = ["scaling", "--only", "window", "--tokens", "512", "--tokens", "1024", "--heads", "2"]
    done = CliRunner().invoke(
        command, [*arguments, "--head-dim", "8", "--rounds", "1", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "theory 1" in done.output
    assert (tmp_path / "scaling.json").stat().st_size > 0
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_subject_is_refused_by_name():
    done = CliRunner().invoke(command, ["scaling", "--only", "windoe"])
    assert isinstance(done.exception, ValueError)
    assert "unknown subject 'windoe'; did you mean 'window'" in str(done.exception)


def test_a_plot_needs_no_complete_grid(tmp_path):
    scaling_plot(
        [Growth("window", 512, 0.1, 0.2, 5), Growth("dense", 512, error="no memory")], tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
