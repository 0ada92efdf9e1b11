"""The crossover study: what is counted, compared and written is right whatever the machine."""

import json
import math
import time

import pytest
import torch

from writehead.bench import crossover
from writehead.bench.crossover import DENSE, SUBJECTS, Cell, peak_cell, study
from writehead.bench.crossover_page import faster_from, page_of, read, slopes
from writehead.bench.live import peak
from writehead.bench.measure import write_record
from writehead.core.work import Call

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
    cells = [
        *series("linear", [T**1.5 for T in LENGTHS], "processor"),
        *series("linear", [T**2 for T in LENGTHS]),
        *series("linear", (3, 3, 3), "decode"),
    ]
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
    "name",
    [
        "linear",
        "linformer_prefix",
        "transformer_xl",
        "sliding_xl",
        "compressive",
        "most_used",
        "long_short_encoder",
    ],
)
def test_bytes_of_both_passes_grow_no_faster_than_the_sequence(name):
    short, long = (peak_cell(name, T).peak_bytes for T in (2048, 4096))
    assert long < 2.15 * short


def test_rounds_of_the_processors_time_end_at_the_length_that_takes_too_long(monkeypatch):
    spent = []

    def train(mixer, tokens, causal, clock):
        spent.append((tokens, clock, torch.get_num_threads()))
        return tokens / 2, tokens - len(spent) / 100

    monkeypatch.setattr(crossover, "_train", train)
    monkeypatch.setattr(crossover, "PATIENCE_S", 40)
    cells = crossover.processor_cells("linear", [32, 64, 128])
    assert spent == [(tokens, time.process_time, 1) for tokens in (32, 64) * crossover.ROUNDS]
    assert [(c.tokens, c.part, c.samples) for c in cells] == [
        (T, "processor", crossover.ROUNDS) for T in (32, 64)
    ]
    assert [c.seconds for c in cells] == [pytest.approx(32 - 0.05), pytest.approx(64 - 0.06)]
    assert [c.flops for c in cells] == [
        crossover.make("linear", T).work(Call(tokens=T)).flops for T in (32, 64)
    ]


def test_of_two_records_of_a_cell_the_later_counts_whatever_their_names(tmp_path):
    for name, seconds, date in (("a", 1.0, "2026-02"), ("b", 2.0, "2026-01")):
        path = tmp_path / f"crossover-{name}.json"
        write_record(path, "crossover", series("linear", (seconds,) * 3))
        record = json.loads(path.read_text())
        record["machine"]["date"] = date
        path.write_text(json.dumps(record))
    assert [cell.seconds for cell in read(tmp_path)] == [1.0] * 3


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
