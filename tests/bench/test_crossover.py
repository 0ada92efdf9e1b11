"""The crossover study: what is counted, compared and written is right whatever the machine."""

import math

import pytest
import torch

from writehead.bench import crossover
from writehead.bench.crossover import DENSE, SUBJECTS, Cell, faster_from, peak_cell, slopes, study
from writehead.bench.crossover_page import page_of, read
from writehead.bench.live import peak
from writehead.bench.measure import write_record

LENGTHS = (4096, 8192, 16384)


def series(name, seconds, part="train"):
    return [Cell(name, T, part, s / 3, s, 1, flops=7 * T) for T, s in zip(LENGTHS, seconds, strict=True)]


def test_the_peak_counts_tensors_while_they_live_in_forward_and_backward():
    x = torch.zeros(1000, requires_grad=True)

    def step():
        a = x.detach() + 1  # 4000 bytes, then 8000
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert peak(step) == 8000
    assert peak(lambda: x.detach()[:10]) == 0
    total = (x * 2.0).sum()
    assert 4000 <= peak(lambda: torch.autograd.grad(total, x)) < 8100


@pytest.mark.parametrize(
    ("times", "first"), [((1, 9, 9), None), ((9, 1, 1), 8192), ((1, 9, 1), 16384), ((1, 1, 1), 4096)]
)
def test_faster_from_is_the_length_beyond_which_nothing_is_slower(times, first):
    cells = [*series(DENSE, (5, 5, 5)), *series("linear", times)]
    assert faster_from(cells, "linear", "train") == (first, 16384)


def test_a_series_that_ended_is_compared_as_far_as_it_goes():
    cells = [
        *series(DENSE, (5, 5, 5)),
        *series("linear", (9, 9, 1))[:2],
        Cell("linear", 16384, "train", over="x"),
    ]
    assert faster_from(cells, "linear", "train") == (None, 8192)
    assert faster_from(cells, "linear", "decode") == (None, 0)


def test_slopes_are_those_of_powers_and_of_the_formula_of_the_mixer():
    cells = [*series("linear", [T**1.5 for T in LENGTHS]), *series("linear", (3, 3, 3), "decode")]
    line = slopes(cells)["linear"]
    assert line["train"] == pytest.approx(1.5)
    assert line["theory"] == pytest.approx(1)
    assert line["decode"] == pytest.approx(0)
    assert line["train to"] == 16384
    assert math.isnan(line["memory"])


def test_a_hopeless_series_stops_and_says_why(monkeypatch):
    times = {DENSE: 1.0, "luna": 5.0}
    monkeypatch.setattr(crossover, "train_cell", lambda name, T: Cell(name, T, "train", 0.1, times[name], 1))
    kept = []
    cells = study(["luna", DENSE], LENGTHS, ["train"], keep=kept.append)
    assert cells == kept
    assert [(c.name, c.tokens, c.over) for c in cells[3:]] == [
        ("luna", 4096, ""),
        ("luna", 8192, ""),
        ("luna", 16384, "5.0 times as long as dense attention at 8192"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linear", "transformer_xl", "sliding_xl", "compressive", "long_short_encoder"]
)
def test_bytes_of_both_passes_grow_no_faster_than_the_sequence(name):
    short, long = (peak_cell(name, T).peak_bytes for T in (2048, 4096))
    assert long < 2.15 * short


@pytest.mark.slow
def test_every_mechanism_decodes_and_trains_at_a_short_length():
    with torch.random.fork_rng():
        for name, subject in SUBJECTS.items():
            assert crossover.train_cell(name, 32).seconds > 0
            assert not subject.causal or crossover.decode_cell(name, 32).flops > 0


def test_the_page_says_where_each_mechanism_pays_and_where_its_series_ends(tmp_path):
    cells = [*series(DENSE, (5, 5, 5)), *series("linear", (9, 1, 1)), *series("luna", (9, 9, 9)),
             Cell("synthesizer_dense", 4096, "train", over="too large")]  # fmt: skip
    for name, part in (("a", cells[:3]), ("b", cells[3:])):
        write_record(tmp_path / f"crossover-{name}.json", "crossover", part)
    assert read(tmp_path, "crossover-b.json") == read(tmp_path)[:3] != []
    text = page_of(read(tmp_path))
    assert "| `linear` | 8192 tokens | not measured |" in text
    assert "| `luna` | never up to 16384 | not measured |" in text
    assert "- `synthesizer_dense`, training, ends before 4096: too large." in text
    with pytest.raises(ValueError, match=r"there is no record crossover-\*\.json"):
        page_of([])
