"""The cache: growth, capacity, ring, sinks, ragged rows, storage types, in place, join, rewind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writehead.core.cache import KV, append, empty, share_positions, state_bytes
from writehead.core.pattern import Causal, Leading, Reach, Window
from writehead.core.positions import Positions
from writehead.core.slots import SMALLEST, Layout, Store
from writehead.core.state import CannotRewind, join, nbytes, rewind, select

G, D = 2, 4
GROWING, RING, SINKS = Causal().reach, Window(5).reach, (Window(5) | Leading(3)).reach


def made(reach=GROWING, batch=2, **store) -> KV:
    return empty(batch, G, (D, D), reach, Store(**store), torch.zeros((), dtype=torch.float64))


def token(position):
    """Keys and values that say where they come from."""
    return position.double()[..., None, None].expand(*position.shape, G, D) + torch.arange(D) / 10


def write(kv: KV, index) -> tuple[KV, object]:
    index = torch.as_tensor(index)
    return append(kv, token(index), -token(index), Positions(index))


def held(kv: KV, row: int) -> dict[int, float]:
    """position -> what its key's first value says."""
    slots = (kv.pos[row] >= 0).nonzero().flatten()
    assert torch.equal(kv.k[row, :, slots], -kv.v[row, :, slots])
    return {int(kv.pos[row, s]): float(kv.k[row, 0, s, 0]) for s in slots}


def run(kv: KV, length: int, batch: int = 2, size: int = 1) -> KV:
    for start in range(0, length, size):
        stop = min(length, start + size)
        kv, _ = write(kv, torch.arange(start, stop).expand(batch, -1))
    return kv


def test_a_growing_cache_doubles_from_sixteen():
    kv, slots = made(), []
    for t in range(70):
        kv, _ = write(kv, [[t], [t]])
        slots.append(kv.k.shape[2])
    assert SMALLEST == 16
    assert sorted(set(slots)) == [16, 32, 64, 128]
    assert [slots.index(s) for s in (16, 32, 64, 128)] == [0, 16, 32, 64]
    assert held(kv, 1) == {t: float(t) for t in range(70)}


def test_a_capacity_is_allocated_at_once_and_doubled_only_beyond_it():
    kv = made(capacity=20)
    assert kv.k.shape[2] == 20
    kv = run(kv, 20)
    assert kv.k.shape[2] == 20
    assert run(kv, 0) is kv
    kv, _ = write(kv, [[20], [20]])
    assert kv.k.shape[2] == 32


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 13, 40])
@pytest.mark.parametrize("slack", [0, 2])
def test_a_ring_keeps_the_window_and_its_slack_however_it_is_written(size, slack):
    kv = run(made(RING, slack=slack), 40, size=size)
    assert kv.k.shape[2] == 5 + slack
    assert held(kv, 0) == {t: float(t) for t in range(40 - 5 - slack, 40)}


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_a_ring_behind_sinks_keeps_the_first_keys_too(size):
    kv = run(made(SINKS), 40, size=size)
    assert kv.k.shape[2] == 8
    assert held(kv, 1) == {t: float(t) for t in (0, 1, 2, 35, 36, 37, 38, 39)}


def test_a_ring_that_is_not_full_is_allocated_by_doubling_up_to_its_limit():
    kv = run(made(Window(100).reach), 3)
    assert kv.k.shape[2] == 16
    assert run(made(Window(100).reach), 200, size=50).k.shape[2] == 100
    assert made(Window(5).reach, capacity=50).k.shape[2] == 5


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("T", range(1, 8))
def test_what_a_call_reads_is_the_past_that_its_queries_need_and_itself(T, slack):
    kv = run(made(RING, slack=slack), 20)
    _, keys = write(kv, torch.arange(20, 20 + T).expand(2, -1))
    assert set(range(16, 20 + T)) <= set(keys.pos[0].tolist())
    slots = keys.pos[0] >= 0
    assert torch.equal(keys.k[0, slots, 0, 0], keys.pos[0][slots].double())
    assert torch.equal(keys.v[0, slots], -keys.k[0, slots])


def test_padding_is_not_stored_and_ragged_rows_are_left_aligned():
    kv, keys = write(made(), [[-1, -1, 0, -1, 1, 2], [0, 1, 2, 3, 4, -1]])
    assert held(kv, 0) == {0: 0, 1: 1, 2: 2}
    assert held(kv, 1) == {t: t for t in range(5)}
    assert kv.used == 5
    assert keys.pos.tolist() == [[-1, -1, 0, -1, 1, 2], [0, 1, 2, 3, 4, -1]]
    kv, keys = write(kv, [[3, -1], [-1, 5]])
    assert kv.pos[:, :6].tolist() == [[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5]]
    assert keys.pos.tolist() == kv.pos[:, :6].tolist()


def test_a_call_of_padding_only_changes_nothing():
    kv = run(made(RING), 7)
    before = (held(kv, 0), kv.used, kv.k.shape)
    kv, keys = write(kv, [[-1, -1], [-1, -1]])
    assert (held(kv, 0), kv.used, kv.k.shape) == before
    assert {p for p in keys.pos[0].tolist() if p >= 0} == {2, 3, 4, 5, 6}


@given(
    st.sampled_from([GROWING, RING, SINKS, Reach(2, 0)]),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.data(),
)
def test_any_ragged_writes_leave_each_row_with_what_it_needs(reach, sizes, data):
    kv = made(reach)
    count = [0, 0]
    for size in sizes:
        rows = []
        for row in range(2):
            real = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
            index = []
            for r in real:
                index.append(count[row] if r else -1)
                count[row] += r
            rows.append(index)
        kv, _ = write(kv, rows)
    for row in range(2):
        there = held(kv, row)
        assert all(value == position for position, value in there.items())
        needed = [
            p
            for p in range(count[row])
            if reach.window is None or p < reach.lead or p > count[row] - 1 - reach.window
        ]
        assert set(needed) <= set(there)
        if reach.window == 5:
            assert set(needed) == set(there)


@pytest.mark.parametrize("reach", [GROWING, RING, SINKS])
def test_without_autograd_writing_is_in_place(reach):
    kv = run(made(reach, capacity=40), 20)
    where = kv.k.data_ptr(), kv.v.data_ptr()
    kv = run_on(kv, 20, 30)
    assert (kv.k.data_ptr(), kv.v.data_ptr()) == where


def run_on(kv, start, stop):
    for t in range(start, stop):
        kv, _ = write(kv, [[t], [t]])
    return kv


@pytest.mark.parametrize("index", [[[0, 1, 2], [0, 1, 2]], [[0, -1, 1], [0, 1, 2]]])
def test_with_autograd_the_past_is_left_as_it_was(index):
    kv = made(capacity=8)
    pos = Positions(torch.tensor(index))
    k = token(pos.index).clone().requires_grad_()
    after, _ = append(kv, k, -k, pos)
    assert torch.equal(kv.k, torch.zeros_like(kv.k))
    further, _ = append(after, k + 3, -k - 3, Positions(torch.where(pos.index < 0, -1, pos.index + 3)))
    (gradient,) = torch.autograd.grad(further.k.sum() + (2 * after.k).sum(), k)
    assert torch.equal(gradient, 4.0 * (pos.index >= 0)[..., None, None].expand_as(k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_floats_err_by_half_a_unit_in_the_last_place(dtype):
    kv = made(dtype=dtype)
    k = torch.randn(2, 9, G, D, dtype=torch.float64)
    kv, keys = append(kv, k, 2 * k, Positions.range(2, 0, 9))
    assert kv.k.dtype == dtype
    assert keys.k.dtype == torch.float64
    bound = torch.finfo(dtype).eps / 2 * k.abs() + torch.finfo(dtype).smallest_normal
    assert bool(((keys.k - k).abs() <= bound).all())
    assert bool(((keys.v - 2 * k).abs() <= 2 * bound).all())
    assert bool((keys.k != k).any())


def test_int8_errs_by_half_a_step_of_each_head_and_token():
    kv = made(dtype=torch.int8)
    k = (
        torch.randn(2, 9, G, D, dtype=torch.float64)
        * torch.tensor([1e-3, 1, 50, 1e4, 1, 1, 1, 1, 1]).double()[:, None, None]
    )
    kv, keys = append(kv, k, k, Positions.range(2, 0, 9))
    assert kv.k.dtype == torch.int8
    assert kv.scales[0].shape == (2, G, 16, 1)
    step = k.abs().amax(-1, keepdim=True) / 127
    assert bool(((keys.k - k).abs() <= step * (0.5 + 1e-4)).all())
    zero = torch.zeros(2, 1, G, D, dtype=torch.float64)
    _, keys = append(kv, zero, zero, Positions.range(2, 9, 10))
    assert torch.equal(keys.k[:, 9], zero[:, 0])


@pytest.mark.parametrize("reach", [GROWING, RING])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_rows_joined_from_caches_of_different_capacity_go_on_as_before(reach, dtype):
    small, large = made(reach, dtype=dtype), made(reach, batch=1, capacity=64, dtype=dtype)
    small, _ = write(small, torch.arange(20).expand(2, -1))
    large, _ = write(large, torch.arange(3)[None])
    apart = [
        write(select(kv, torch.arange(len(kv.pos))), index)[1]
        for kv, index in ((small, [[20], [-1]]), (large, [[3]]))
    ]
    both = join(small, large)
    assert both.k.shape[2] == max(small.k.shape[2], large.k.shape[2])
    _, keys = write(both, [[20], [-1], [3]])
    for row, (alone, own) in enumerate([(apart[0], 0), (apart[0], 1), (apart[1], 0)]):
        by_position = {int(p): keys.k[row, s] for s, p in enumerate(keys.pos[row]) if p >= 0}
        expected = {int(p): alone.k[own, s] for s, p in enumerate(alone.pos[own]) if p >= 0}
        assert by_position.keys() == expected.keys()
        assert all(torch.equal(by_position[p], expected[p]) for p in expected)


def test_caches_of_different_kinds_do_not_join():
    with pytest.raises(
        ValueError, match=r"cannot join caches of different kinds: .*window=None.* and .*window=5"
    ):
        join(made(GROWING), made(RING))
    with pytest.raises(ValueError, match="cannot join caches of different kinds"):
        join(made(), made(dtype=torch.int8))


@pytest.mark.parametrize(("reach", "slack"), [(GROWING, 0), (RING, 4), (SINKS, 4)])
@pytest.mark.parametrize("n", [0, 1, 4, torch.tensor([4, 0]), torch.tensor([1, 3])])
def test_a_cache_rewinds_as_far_as_its_slack(reach, slack, n):
    kv = rewind(run(made(reach, slack=slack), 20), n)
    for row, count in enumerate([n, n] if isinstance(n, int) else n.tolist()):
        there = held(kv, row)
        assert max(there) == 19 - count
        needed = [
            p for p in range(20 - count) if reach.window is None or p < reach.lead or p > 19 - count - 4
        ]
        assert set(needed) <= set(there)


def test_a_growing_cache_rewinds_to_nothing_and_starts_again():
    kv = rewind(run(made(), 20), 20)
    assert held(kv, 0) == {}
    assert kv.used == 0
    assert held(run(kv, 2), 1) == {0: 0, 1: 1}


def test_a_ring_does_not_pretend_to_remember():
    kv = run(made(RING, slack=3), 20)
    message = r"a ring of window 5 and slack 3 no longer holds .* the last 5 tokens; .* with Store\(slack=5\)"
    with pytest.raises(CannotRewind, match=message):
        rewind(kv, 5)
    with pytest.raises(CannotRewind, match=r"the last 9 tokens; .* Store\(slack=9\)"):
        rewind(kv, torch.tensor([0, 9]))
    assert set(held(rewind(kv, 4), 0)) == {12, 13, 14, 15}


def test_a_ring_that_has_not_turned_yet_rewinds_without_slack():
    assert set(held(rewind(run(made(RING), 5), 4), 0)) == {0}


def test_more_tokens_than_there_are_cannot_be_taken_back():
    with pytest.raises(ValueError, match=r"cannot take back \[4, 4\] tokens of rows that hold \[3, 3\]"):
        rewind(run(made(), 3), 4)
    with pytest.raises(ValueError, match="must not be negative"):
        rewind(run(made(), 3), -1)


@given(
    st.sampled_from([GROWING, RING, SINKS]),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 3),
    st.sampled_from([None, torch.bfloat16, torch.int8]),
)
def test_state_bytes_are_the_bytes_held(reach, context, capacity, slack, dtype):
    store = Store(capacity=capacity, slack=slack, dtype=dtype)
    kv = run(empty(3, G, (D, 6), reach, store, torch.zeros((), dtype=torch.float64)), 0)
    if context:
        index = torch.arange(context).expand(3, -1)
        v = torch.zeros(3, context, G, 6, dtype=torch.float64)
        kv, _ = append(kv, token(index), v, Positions(index))
    slots = Layout.of(reach, store).slots(context, capacity)
    assert nbytes(kv) == state_bytes(3, slots, G, (D, 6), 8 if dtype is None else dtype.itemsize)


def test_layers_of_equal_layout_share_their_positions_and_plan_once():
    a, b, ring = share_positions([made(), made(), made(RING)])
    assert a.pos is b.pos
    assert ring.pos is not a.pos or ring.pos.shape == a.pos.shape
    pos = Positions.range(2, 0, 3)
    a, _ = append(a, token(pos.index), token(pos.index), pos)
    b, _ = append(b, token(pos.index), token(pos.index), pos)
    assert a.pos is b.pos
    assert nbytes((a, b)) == 2 * nbytes(a) - a.pos.nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": -1}, "capacity=-1 and slack=0 must be at least 0"),
        ({"slack": -2}, "capacity=0 and slack=-2 must be at least 0"),
        ({"dtype": torch.int16}, "cache dtype torch.int16 is not accepted; use one of None, .*torch.int8"),
    ],
)
def test_a_store_refuses_what_it_cannot_keep(options, message):
    with pytest.raises(ValueError, match=message):
        Store(**options)
