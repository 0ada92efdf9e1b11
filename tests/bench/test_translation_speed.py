"""Decoding by kind of attention: what the formulas predict, and that what is measured is that model."""

from pathlib import Path

import pytest

from writehead.bench import translation_speed
from writehead.bench.machine import Roofs
from writehead.bench.translation_speed import PAPER, PHASES, THEIRS, Shape, config, least
from writehead.costs import parameters, skeleton

SMALL = Shape(
    dim=16, heads=2, hidden=32, shared_hidden=40, vocab=50, window=2, depth=1, length=6, batch=4, trained=1
)


def test_all_variants_are_models_of_the_papers_size() -> None:
    sizes = [parameters(skeleton(config(Shape(), variant))) for variant in PAPER]
    assert max(sizes) - min(sizes) == 0
    assert abs(sizes[0] / 211e6 - 1) < 0.01


def test_operations_bound_training_and_bytes_bound_multi_head_decoding_in_the_paper() -> None:
    found = {variant: least(Shape(), variant, THEIRS, 1024, 2, False) for variant in PAPER}
    for variant, theirs in PAPER.items():
        assert all(found[variant][phase] < figure for phase, figure in zip(PHASES, theirs, strict=True))
    more_rate = least(Shape(), "multi-head", Roofs.given(2.4e12, 1e15), 1024, 2, False)
    assert more_rate["greedy"] == pytest.approx(found["multi-head"]["greedy"], rel=0.01)
    assert more_rate["training"] < found["multi-head"]["training"] / 5


def test_beams_read_their_source_once_here() -> None:
    slow = Roofs.given(1.0, 1e30)
    once, each = (least(SMALL, "multi-head", slow, 4, 4, sources_once) for sources_once in (True, False))
    a_step = (
        4 * 3 * SMALL.length * 2 * SMALL.dim * 4
    )  # bytes of keys and values of three more rows a sentence
    assert (each["beam 4"] - once["beam 4"]) * 4 / 1e6 == pytest.approx(a_step)
    assert once["greedy"] == each["greedy"]


@pytest.mark.slow
def test_every_variant_is_measured_in_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation_speed, "roofs", lambda: Roofs.given(1e10, 1e11))
    cells = translation_speed.measure(SMALL, rounds=2, say=lambda text: None)
    assert [(c.variant, c.phase) for c in cells] == [(v, p) for v in PAPER for p in PHASES]
    assert all(c.measured == min(c.samples) > c.least for c in cells)
    translation_speed.write_speed(cells, SMALL, tmp_path)
    record = translation_speed.read_speed(tmp_path)
    assert record is not None
    kept = translation_speed.cells_of(record)
    assert [(c.variant, c.phase, c.measured, c.paper) for c in kept] == [
        (c.variant, c.phase, c.measured, c.paper) for c in cells
    ]
    text = "\n".join(translation_speed.speed_page(record))
    assert "- beam 4 local:" in text
    assert text.count("| multi-query local |") == 1
