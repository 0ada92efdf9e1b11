"""The duplication task: what it asks, and that a layer learns it."""

import pytest
import torch

from writehead.bench.duplication import FULL, Task, attend, judge, learn, markdown

TASK = Task(word=3, symbols=4, dim=16, heads=2, window=4, rows=8, steps=2, judged=4)


def test_a_sequence_says_its_word_twice_behind_zeros() -> None:
    rows = TASK.draw(5, torch.Generator().manual_seed(0))
    assert rows.shape == (5, TASK.length)
    assert torch.equal(rows[:, :4], rows[:, 4:])
    assert (rows[:, 0] == 0).all()
    assert (int(rows[:, 1:4].min()), int(rows[:, 1:4].max())) == (1, 4)


def test_full_attention_reads_every_earlier_token() -> None:
    model = TASK.model().eval()
    attend(model, FULL, TASK)
    rows = TASK.draw(1, torch.Generator().manual_seed(1))
    before = model(rows)[0]
    rows[0, 1] = rows[0, 1] % 4 + 1
    assert ((model(rows)[0] - before).abs().amax(-1)[0] > 0).tolist() == [False] + [True] * 7


def test_judging_leaves_the_trained_model_as_it_was() -> None:
    model = learn(TASK, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracies = {rounds: judge(model, TASK, rounds) for rounds in (FULL, 8)}
    assert all(0 <= value <= 1 for value in accuracies.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_full_attention_learns_a_short_word() -> None:
    task = Task(word=3, symbols=4, dim=32, heads=2, window=4, rows=32, steps=400, judged=64, lr=0.01)
    assert judge(learn(task, FULL), task, FULL) > 0.9


def test_the_table_has_a_row_for_each_training() -> None:
    assert markdown({"full": {"full": 1.0, "LSH-2": 0.5}}).splitlines() == [
        "| trained with | judged with full | judged with LSH-2 |",
        "|---|---|---|",
        "| full | 100.0% | 50.0% |",
    ]
