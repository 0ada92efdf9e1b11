"""Parts of the kernel benchmark that are right or wrong whatever the machine; toy tasks, learned and not."""

import pytest
import torch

from writehead.bench.feature_maps import _peak, estimate, exponent, first_faster
from writehead.bench.measure import Timing
from writehead.bench.toys import CANNOT, LEARN, SYMBOLS, THINGS, copy, learn, recall


def timing(seconds):
    return Timing(seconds, seconds, seconds, 1, (seconds,))


def test_the_exponent_of_a_power_is_found_whatever_its_factor():
    x = [1000, 2000, 4000, 16000]
    assert exponent(x, [7 * v**1.5 for v in x]) == pytest.approx(1.5, abs=1e-12)
    assert exponent(x, [3.0] * 4) == pytest.approx(0, abs=1e-12)


def test_the_peak_counts_tensors_while_they_live_in_forward_and_backward():
    x = torch.zeros(1000, requires_grad=True)

    def step():
        a = x.detach() + 1  # 4000 bytes, then 8000
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert _peak(step) == 8000
    assert _peak(lambda: x.detach()[:10]) == 0
    total = (x * 2.0).sum()
    assert 4000 <= _peak(lambda: torch.autograd.grad(total, x)) < 8100


@pytest.mark.parametrize(
    ("times", "first"),
    [((1, 9, 9, 9), None), ((9, 9, 1, 1), 1024), ((9, 1, 9, 1), 2048), ((1, 1, 1, 1), 256)],
)
def test_faster_from_is_the_length_beyond_which_nothing_is_slower(times, first):
    lengths = ("256", "512", "1024", "2048")
    ours = {name: timing(s) for name, s in zip(lengths, times, strict=True)}
    assert first_faster(ours, {name: timing(5) for name in lengths}) == first


def test_more_features_estimate_better_and_waves_are_worst_where_features_are_few():
    found = estimate((16, 128), seeds=10)
    for line in found.values():
        assert line["128"] < line["16"]
    assert found["waves, independent"]["16"] > 2 * found["positive, independent"]["16"]


def test_the_tasks_ask_for_what_was_said():
    for task in (recall, copy):
        batch = task(5, torch.Generator().manual_seed(1))
        for row in range(5):
            said = dict(
                zip(batch.place[row, :THINGS].tolist(), batch.symbol[row, :THINGS].tolist(), strict=True)
            )
            asked = batch.place[row, THINGS:].tolist()
            assert [said[place] for place in asked] == batch.answer[row].tolist()
            assert sorted(asked) == list(range(THINGS))
            assert batch.symbol[row, THINGS:].tolist() == [SYMBOLS] * THINGS


@pytest.mark.slow
@pytest.mark.parametrize("task", ["recall", "copy"])
@pytest.mark.parametrize("name", ["linear, one write-head", "rfa_gate"])
def test_recurrent_states_that_are_large_enough_learn(name, task):
    assert learn(LEARN[name], task, steps=200) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_remember_does_not_learn_to_recall(name):
    assert learn(CANNOT[name], "recall", steps=200) < 0.6
