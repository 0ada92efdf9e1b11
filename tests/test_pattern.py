"""Patterns: properties tie allows, mask, keys, needed, reach and slots; then what each pattern means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writehead.core.cache import Layout, Store
from writehead.core.pattern import (
    PATTERNS,
    And,
    Causal,
    Full,
    Leading,
    Or,
    Pattern,
    PerHead,
    Reach,
    Window,
    from_spec,
    to_spec,
)

N = 24  # positions looked at
SIMPLE = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(Window, st.integers(1, 9), st.integers(0, 3)),
    st.builds(Leading, st.integers(1, 6)),
)
FREE = st.recursive(SIMPLE, lambda p: st.one_of(st.builds(And, p, p), st.builds(Or, p, p)), max_leaves=5)
HEADED = st.builds(lambda *p: PerHead(p), FREE, FREE, FREE)
ANY = st.one_of(FREE, HEADED, st.builds(And, HEADED, FREE), st.builds(Or, HEADED, HEADED))
ANY = st.one_of(ANY, st.builds(And, FREE, HEADED), st.builds(And, HEADED, HEADED))


def dense(pattern: Pattern) -> torch.Tensor:
    """bool (heads or 1, N queries, N keys), query by query from the definition."""
    k = torch.arange(N)[None, None]
    return torch.cat([pattern.allows(torch.tensor([[[q]]]), k) for q in range(N)], 1)


@given(ANY)
def test_mask_is_allows_pair_by_pair_and_padding_takes_part_in_nothing(pattern):
    index = torch.arange(N)[None]
    right = dense(pattern)
    assert torch.equal(pattern.mask(index, index)[0].expand_as(right), right)
    padded = torch.where(index % 3 == 1, -1, index)
    mask = pattern.mask(padded, padded)[0].expand_as(right)
    real = padded[0] >= 0
    assert torch.equal(mask[:, real][:, :, real], right[:, real][:, :, real])
    assert not mask[:, ~real].any()
    assert not mask[:, :, ~real].any()


def listable(pattern: Pattern) -> bool:
    if isinstance(pattern, And):
        return listable(pattern.a) or listable(pattern.b)
    if isinstance(pattern, Or):
        return listable(pattern.a) and listable(pattern.b)
    return all(map(listable, pattern.patterns)) if isinstance(pattern, PerHead) else pattern != Full()


@given(ANY)
def test_keys_lists_each_key_that_some_head_reads_once(pattern):
    if not listable(pattern):
        with pytest.raises(ValueError, match="Full has no finite list of keys"):
            pattern.keys(torch.arange(N))
        return
    keys = pattern.keys(torch.arange(N))
    right = dense(pattern).any(0)
    for q, row in enumerate(keys.tolist()):
        listed = sorted(k for k in row if k >= 0)
        assert [k for k in listed if k < N] == right[q].nonzero().flatten().tolist()
        assert len(set(listed)) == len(listed)


@given(ANY)
def test_needed_and_reach_keep_every_key_that_a_later_query_reads(pattern):
    right = dense(pattern).any(0)
    q, k, t = torch.meshgrid(torch.arange(N), torch.arange(N), torch.arange(N), indexing="ij")
    read_later = right[q, k] & (q >= t)
    assert bool((pattern.needed(k, t) | ~read_later).all())
    lead, window = pattern.reach
    if window is not None:
        assert torch.equal(pattern.needed(k, t), (k < lead) | (t - k < window))


@given(ANY, st.integers(0, 4))
def test_no_two_keys_that_are_needed_at_once_share_a_slot(pattern, slack):
    layout = Layout.of(pattern.reach, Store(slack=slack))
    at = torch.arange(3 * N)
    for t in range(3 * N):
        past = at[:t]
        kept = past[pattern.needed(past, torch.tensor(t - slack))]  # rewinding may bring these back
        slots = layout.slot(kept)
        assert len(slots.unique()) == len(kept)
        if layout.limit is not None and len(slots):
            assert int(slots.max()) < layout.limit


@given(ANY)
def test_a_causal_pattern_reads_no_later_key(pattern):
    later = dense(pattern) & torch.ones(N, N, dtype=torch.bool).triu(1)
    if pattern.causal:
        assert not later.any()


@given(ANY)
def test_a_pattern_survives_its_spec_its_repr_and_equality(pattern):
    again = from_spec(to_spec(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again is from_spec(again)
    assert eval_free(repr(pattern)) == pattern


def eval_free(text: str) -> Pattern:
    """The pattern that a repr shows, read by Python's own grammar without running it."""
    import ast

    names = {kind.__name__: kind for kind in PATTERNS.values()}

    def build(node):
        if isinstance(node, ast.BinOp):
            return (And if isinstance(node.op, ast.BitAnd) else Or)(build(node.left), build(node.right))
        if isinstance(node, ast.Call):
            return names[node.func.id](
                *map(build, node.args), **{k.arg: build(k.value) for k in node.keywords}
            )
        return tuple(map(build, node.elts)) if isinstance(node, ast.Tuple) else ast.literal_eval(node)

    return build(ast.parse(text, mode="eval").body)


@given(FREE, FREE)
def test_and_and_or_are_intersection_and_union(a, b):
    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert torch.equal(dense(a | b), dense(a) | dense(b))


@given(HEADED, FREE)
def test_per_head_gives_each_head_its_own_pattern(a, b):
    assert torch.equal(dense(a), torch.cat([dense(p) for p in a.patterns]))
    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert a.heads == (a & b).heads == (b | a).heads == 3


def test_window_counts_the_query_itself():
    q, k = torch.tensor([[5]]), torch.arange(8)[None]
    assert Window(3).mask(q, k)[0, 0, 0].nonzero().flatten().tolist() == [3, 4, 5]
    assert Window(1).mask(q, k)[0, 0, 0].nonzero().flatten().tolist() == [5]
    assert Window(3, after=2).mask(q, k)[0, 0, 0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert Window(3).keys(torch.tensor([1])).tolist() == [[1, 0, -1]]


def test_sinks_are_the_first_keys_and_the_window_but_nothing_later():
    sinks = Causal() & (Window(2) | Leading(3))
    q, k = torch.tensor([[0, 1, 6]]), torch.arange(8)[None]
    seen = [row.nonzero().flatten().tolist() for row in sinks.mask(q, k)[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2, 5, 6]]
    assert sinks.causal
    assert sinks.reach == Reach(3, 2)


@pytest.mark.parametrize(
    ("pattern", "reach"),
    [
        (Full(), Reach(0, None)),
        (Causal(), Reach(0, None)),
        (Window(4, after=2), Reach(0, 4)),
        (Leading(3), Reach(3, 0)),
        (Window(4) | Leading(3), Reach(3, 4)),
        (Window(4) | Causal(), Reach(0, None)),
        (Window(4) & Leading(3), Reach(3, 0)),
        (Window(4) & Window(6), Reach(0, 4)),
        (Leading(5) & Leading(2), Reach(2, 0)),
        (Causal() & Leading(3), Reach(3, 0)),
        (PerHead((Window(4), Window(9) | Leading(2))), Reach(2, 9)),
        (PerHead((Window(4), Causal())), Reach(0, None)),
    ],
)
def test_reach_is_as_tight_as_the_pattern_allows(pattern, reach):
    assert pattern.reach == reach


@pytest.mark.parametrize(
    ("pattern", "causal"),
    [
        (Full(), False),
        (Causal(), True),
        (Window(3), True),
        (Window(3, after=1), False),
        (Leading(2), False),
        (Causal() & Full(), True),
        (Leading(2) & Causal(), True),
        (Leading(2) & Full(), False),
        (Causal() | Window(3), True),
        (Causal() | Leading(2), False),
        (Leading(2) | Window(3), False),
        (PerHead((Causal(), Window(3))), True),
        (PerHead((Causal(), Full())), False),
        (PerHead((Full(), Causal())), False),
    ],
)
def test_a_combination_is_causal_where_its_parts_make_it_so(pattern, causal):
    assert pattern.causal == causal


def test_reprs_read_as_they_are_written():
    assert (
        repr(Causal() & (Window(4) | Leading(2)))
        == "(Causal() & (Window(window=4, after=0) | Leading(count=2)))"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Window(0),
            r"Window\(window=0, after=0\): window counts the query itself .* nearest is Window\(1, 0\)",
        ),
        (lambda: Window(3, -1), r"nearest is Window\(3, 0\)"),
        (lambda: Leading(0), r"Leading\(0\): count must be at least 1"),
        (lambda: PerHead((Causal(),)), "one head-free pattern for each of two or more heads"),
        (lambda: PerHead((Causal(), PerHead((Causal(), Full())))), "one head-free pattern for each"),
        (
            lambda: PerHead((Causal(), Full())) & PerHead((Causal(), Full(), Full())),
            "cannot combine a pattern for 2 heads with one for 3",
        ),
        (
            lambda: PerHead((Causal(), Full())) | PerHead((Causal(), Full(), Full())),
            "cannot combine a pattern for 2 heads with one for 3",
        ),
        (
            lambda: Full().keys(torch.arange(3)),
            "Full has no finite list of keys: combine it with Causal or Window",
        ),
        (lambda: from_spec({"name": "widow"}), "unknown pattern 'widow'; did you mean 'window'"),
        (lambda: from_spec({"window": 3}), "unknown pattern 'None'"),
        (
            lambda: from_spec({"name": "window", "wimdow": 3}),
            r"field of pattern 'window' 'wimdow'; did you mean 'window'\? \(accepted: after, window\)",
        ),
        (lambda: from_spec({"name": "window"}), "pattern 'window' needs window"),
        (
            lambda: from_spec({"name": "window", "window": "3"}),
            "field 'window' of pattern 'window' must be int; got '3'",
        ),
        (
            lambda: from_spec({"name": "leading", "count": True}),
            "'count' of pattern 'leading' must be int; got True",
        ),
        (
            lambda: from_spec({"name": "and", "a": 3, "b": {"name": "full"}}),
            "'a' of pattern 'and' must be a pattern; got 3",
        ),
        (
            lambda: from_spec({"name": "per_head", "patterns": {"name": "causal"}}),
            "'patterns' of pattern 'per_head' must be a list of patterns",
        ),
        (lambda: from_spec("causal"), "a pattern is a mapping such as .*; got 'causal'"),
    ],
)
def test_what_a_pattern_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
