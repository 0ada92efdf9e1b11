"""Parts of the kernel benchmark that are right or wrong whatever the machine; toy tasks, learned and not."""

import pytest
import torch

from writehead.bench.feature_maps import estimate
from writehead.bench.toys import CANNOT, LEARN, SYMBOLS, THINGS, copy, learn, recall


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
@pytest.mark.parametrize(
    ("name", "task"),
    [("linear, one write-head", "recall"), ("linear, one write-head", "copy"), ("rfa_gate", "recall")],
)
def test_recurrent_states_that_are_large_enough_learn(name, task):
    assert learn(LEARN[name], task, steps=200) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_remember_does_not_learn_to_recall(name):
    assert learn(CANNOT[name], "recall", steps=200) < 0.6
