"""States as trees: select, join, rewind, detach, nbytes; results are shared where tensors are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from writehead.core.state import (
    CannotRewind,
    Node,
    Once,
    apply,
    detach,
    join,
    nbytes,
    rewind,
    select,
    tensors,
)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None


@dataclass(frozen=True)
class Log(Node):
    """Every token's number, for as many rows as there are; rewinding forgets the last ones."""

    tokens: Tensor  # (B, T)
    length: Tensor  # (B,)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.tokens, self.length)

    def map(self, function):
        return Log(function(self.tokens), function(self.length))

    def join(self, other, once):
        return Log(torch.cat([self.tokens, other.tokens]), torch.cat([self.length, other.length]))

    def rewind(self, n, once):
        return Log(self.tokens, self.length - n)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def log(batch=3):
    return Log(torch.arange(batch * 4).reshape(batch, 4), torch.full((batch,), 4))


def test_select_moves_rows_at_every_depth_and_keeps_the_trees_types():
    state = (rows(1, 2, 3), None, 7, Pair(rows(4, 5, 6), None), [log()][0])
    moved = select(state, torch.tensor([2, 0, 0]))
    assert moved[0].flatten().tolist() == [3, 1, 1]
    assert moved[1] is None
    assert moved[2] == 7
    assert isinstance(moved[3], Pair)
    assert moved[3].a.flatten().tolist() == [6, 4, 4]
    assert moved[4].tokens[:, 0].tolist() == [8, 0, 0]
    assert state[0].flatten().tolist() == [1, 2, 3]


def test_select_is_an_independent_copy_also_if_no_row_moves():
    state = (rows(1, 2),)
    copy = select(state, torch.tensor([0, 1]))
    copy[0].zero_()
    assert state[0].flatten().tolist() == [1, 2]


def test_shared_tensors_stay_shared_and_are_worked_on_once():
    shared = rows(1, 2)
    state = (Pair(shared, rows(3, 4)), shared)
    moved = select(state, torch.tensor([1, 0]))
    assert moved[0].a is moved[1]
    joined = join(state, state)
    assert joined[0].a is joined[1]
    calls = []
    assert apply(state, lambda t: calls.append(t) or t + 1)[1].flatten().tolist() == [2, 3]
    assert len(calls) == 2


def test_nbytes_counts_a_shared_tensor_once_and_what_nodes_hold():
    shared = rows(1, 2)
    assert nbytes((shared, shared, None, 5)) == 16
    assert nbytes((shared, shared.clone())) == 32
    assert nbytes(log()) == 3 * 4 * 8 + 3 * 8
    assert nbytes(None) == 0
    assert len(list(tensors((shared, shared)))) == 2


def test_join_puts_the_second_rows_after_the_first():
    a, b = (Pair(rows(1), None), log(1), 3), (Pair(rows(2, 3), None), log(2), 3)
    both = join(a, b)
    assert both[0].a.flatten().tolist() == [1, 2, 3]
    assert both[1].tokens[:, 0].tolist() == [0, 0, 4]
    assert both[2] == 3


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((rows(1),), (None,), "cannot join a state of Tensor with one of NoneType"),
        ((rows(1),), (rows(1), rows(2)), "cannot join a state of tuple with one of tuple"),
        (Pair(rows(1), None), (rows(1), None), "cannot join a state of Pair with one of tuple"),
        ((3,), (4,), "cannot join states whose fixed entries differ: 3 and 4"),
    ],
)
def test_trees_of_different_structure_do_not_join(a, b, message):
    with pytest.raises(ValueError, match=message):
        join(a, b)


def test_rewind_asks_every_node_and_takes_a_number_or_one_for_each_row():
    state = (log(), None, 7, Pair(None, None))
    assert rewind(state, 2)[0].length.tolist() == [2, 2, 2]
    assert rewind(state, torch.tensor([0, 1, 4]))[0].length.tolist() == [4, 3, 0]
    assert rewind(state, 2)[2] == 7


def test_a_tensor_that_sums_up_its_past_cannot_rewind_and_says_so():
    with pytest.raises(
        CannotRewind, match=r"a summary of the past cannot rewind; keep a copy with select\(\)"
    ):
        rewind((log(), rows(1, 2, 3)), 1)
    assert issubclass(CannotRewind, ValueError)


@pytest.mark.parametrize("n", [-1, torch.tensor([0, -2, 1])])
def test_rewinding_forwards_is_refused(n):
    with pytest.raises(ValueError, match="must not be negative"):
        rewind(log(), n)


def test_a_state_without_tensors_rewinds_to_itself():
    assert rewind((None, 3), 2) == (None, 3)


def test_detach_cuts_gradients_and_keeps_values():
    leaf = rows(1, 2).requires_grad_()
    state = (Pair(leaf * 2, None), log(2))
    cut = detach(state)
    assert not cut[0].a.requires_grad
    assert cut[0].a.flatten().tolist() == [2, 4]


def test_once_tells_tensors_apart_by_identity_and_functions_by_themselves():
    calls = []

    def note(*args):
        calls.append(args)
        return len(calls)

    once, a, b = Once(), rows(1), rows(1)
    assert [once(note, a, 0), once(note, b, 0), once(note, a, 0), once(note, a, 1)] == [1, 2, 1, 3]
    assert once(lambda *args: -1, a, 0) == -1


def test_once_keeps_its_arguments_so_that_an_address_is_not_taken_for_another_tensor():
    once = Once()
    results = [once(float, torch.tensor(float(i))) for i in range(50)]
    assert results == [float(i) for i in range(50)]


def test_settling_keeps_what_follows_from_the_index_and_carries_no_gradient():
    index, own, gain, made, once = torch.arange(3), torch.arange(3), nn.Parameter(torch.ones(3)), [], Once()

    def times(t, factor):
        made.append(factor)
        return Pair(t * (gain if factor == "gain" else factor), None), [factor]

    def ask():
        made.clear()
        double = once(times, index, 2)[0].a
        for tensor, factor in ((double, 3), (own, 4), (index, 0.5), (index, "gain")):
            once(times, tensor, factor)
        return list(made)

    assert ask() == [2, 3, 4, 0.5, "gain"]
    assert ask() == []
    once.settle(index, graph=True)
    assert ask() == [4, "gain"]
    once.settle(index, graph=False)
    assert ask() == [4, 0.5, "gain"]
