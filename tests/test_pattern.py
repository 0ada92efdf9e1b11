"""Patterns: properties tie allows, mask, keys, needed, reach and slots; then what each pattern means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writehead.core.pattern import (
    PATTERNS,
    And,
    Axis,
    Block,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Fixed,
    Full,
    Image1D,
    Image2D,
    Leading,
    Or,
    Pattern,
    PerHead,
    Random,
    Reach,
    Readers,
    Span,
    Strided,
    Window,
    from_spec,
    to_spec,
)
from writehead.core.slots import Layout, Store

N = 24  # positions looked at
PLAIN = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(Window, st.integers(1, 9), st.integers(0, 3)),
    st.builds(Leading, st.integers(1, 6)),
)
small = st.integers
FIXED = st.builds(
    lambda c, parts, part, rest: Fixed(c * parts + rest, c, part % parts),
    small(1, 2),
    small(1, 3),
    small(0, 2),
    small(0, 3),
)
SPARSE = st.one_of(
    st.builds(Readers, small(1, 5), small(0, 9)),
    st.builds(Span, small(0, 20), small(1, 4)),
    st.builds(Blocks, small(1, 5), small(0, 2), small(0, 2)),
    st.builds(Strided, small(1, 7)),
    FIXED,
    st.builds(Dilated, small(1, 4), small(1, 4), small(0, 2)),
    st.builds(Block, small(1, 7), small(0, 2)),
    st.builds(
        lambda size, blocks: Block(size, blocks_read=tuple(blocks)), small(1, 5), st.permutations(range(3))
    ),
    st.builds(Axis, small(1, 5), small(1, 6), small(0, 1)),
    st.builds(Random, small(1, 4), small(1, 2), small(0, 9), small(0, 1), st.sampled_from([0, 4, 8])),
    st.builds(Image1D, small(1, 6), small(0, 7)),
    st.builds(
        lambda n, w, r, a, b: Image2D(n * w, r, w, a, b),
        small(1, 3),
        small(1, 3),
        small(1, 3),
        small(0, 4),
        small(0, 4),
    ),
)
SIMPLE = PLAIN | SPARSE
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
    return (
        all(map(listable, pattern.patterns))
        if isinstance(pattern, PerHead)
        else not isinstance(pattern, Full | Readers)
    )


@given(ANY)
def test_keys_lists_each_key_that_some_head_reads_once(pattern):
    if not listable(pattern):
        with pytest.raises(ValueError, match="has no finite list of keys"):
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
    lead, window, columns = pattern.reach
    if window is not None:
        kept = torch.zeros_like(k, dtype=torch.bool) if columns is None else columns.holds(k)
        assert torch.equal(pattern.needed(k, t), (k < lead) | (t - k < window) | kept)


@given(ANY, st.integers(1, 7))
def test_no_tile_outside_of_the_block_layout_has_a_pair(pattern, size):
    grid = pattern.blocks(N, size)
    right = dense(pattern)
    for head, plane in enumerate(right):
        q, k = plane.nonzero().unbind(1)
        assert bool(grid[head if len(grid) > 1 else 0, q // size, k // size].all())


@given(st.one_of(PLAIN, SPARSE), st.integers(1, 7))
def test_the_block_layout_of_a_pattern_without_parts_is_exact(pattern, size):
    if isinstance(pattern, Image2D | Axis):  # these two bound a tile by its farthest keys
        return
    grid, (plane,) = pattern.blocks(N, size)[0], dense(pattern)
    q, k = plane.nonzero().unbind(1)
    right = torch.zeros_like(grid)
    right[q // size, k // size] = True
    if isinstance(pattern, Block) and pattern.back:  # a tile over several blocks may pair the wrong two
        assert bool((grid | ~right).all())
    else:
        assert torch.equal(grid, right)


@given(ANY)
def test_flex_attention_takes_the_same_pairs(pattern):
    from torch.nn.attention.flex_attention import create_mask

    mask = create_mask(pattern.mask_mod(), 1, pattern.heads, N, N, device="cpu")[0]
    assert torch.equal(mask, dense(pattern).expand_as(mask))


@given(HEADED)
def test_the_heads_of_a_combination_are_the_combined_heads(pattern):
    both = pattern & (Window(5) | Leading(2))
    assert torch.equal(dense(both), torch.cat([dense(both.head(h)) for h in range(3)]))


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
        (Strided(4), Reach(0, None)),
        (Strided(4) & Window(9), Reach(0, 9)),
        (Fixed(8, 2), Reach(0, 0, Columns(8, 6, 2))),
        (Causal() & Fixed(8, 2), Reach(0, 0, Columns(8, 6, 2))),
        (Fixed(8, 2, part=1) | Window(8), Reach(0, 8, Columns(8, 4, 2))),
        (Fixed(8, 2) | Fixed(8, 2, part=1), Reach(0, 0, Columns(8, 4, 4))),
        (Fixed(8, 2) | Fixed(6, 2), Reach(0, None)),
        (Fixed(8, 2) & Window(5), Reach(0, 5)),
        (Dilated(3, 4), Reach(0, 9)),
        (Causal() & Block(6), Reach(0, 6)),
        (Causal() & Block(6, back=2), Reach(0, 18)),
        (Block(6, blocks_read=(2, 0, 1)), Reach(0, 12)),
        (Axis(5, 4, 0), Reach(0, 17)),
        (Axis(5, 4, 1), Reach(0, 4)),
        (Readers(3), Reach(0, 3)),
        (Readers(3, start=4), Reach(0, 7)),
        (Span(4, 3), Reach(7, 0)),
        (Blocks(4, 2, 1), Reach(0, 12)),
        (Random(4, 2), Reach(0, None)),
        (Image1D(4, 6), Reach(0, 10)),
        (Image2D(32, 4, 8, 4, 8), Reach(0, 32 * 4 + 4 * (8 + 8))),
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
        (lambda: Readers(0), "count must be at least 1"),
        (lambda: Span(-1, 2), "start must be at least 0, count at least 1"),
        (lambda: Blocks(4, -1), "before and after must be at least 0"),
        (lambda: Strided(0), r"Strided\(stride=0\): stride must be at least 1"),
        (lambda: Fixed(8, 3, 2), r"part=2\): a block has parts 0 to 1"),
        (lambda: Dilated(0, 2), "window must be at least 1"),
        (lambda: Dilated(2, 2, -1), "after must be at least 0"),
        (lambda: Block(4, 1, (1, 0)), "back must be at least 0, and 0 where an order is given"),
        (lambda: Block(4, blocks_read=(1, 1)), "it must hold each of 0 to 1 once"),
        (lambda: Axis(4, 4, 2), r"axis must be 0 \(columns\) or 1 \(rows\)"),
        (lambda: Random(0, 1), "size and count must be at least 1"),
        (lambda: Image1D(0, 1), "block must be at least 1"),
        (lambda: Image2D(8, 0, 4, 1, 1), "rows and columns must be at least 1"),
        (lambda: Image2D(9, 2, 4, 1, 1), "width=9 must be a positive multiple of columns=4; nearest is 8"),
        (lambda: Readers(3).keys(torch.arange(3)), "Readers has no finite list of keys"),
        (
            lambda: from_spec({"name": "block", "size": 3, "blocks_read": ["1"]}),
            "'blocks_read' of pattern 'block' must be int; got '1'",
        ),
        (
            lambda: from_spec({"name": "block", "size": 3, "blocks_read": 2}),
            "must be a list of whole numbers",
        ),
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


def test_tiles_of_image_blocks_are_those_that_hold_a_pair():
    pattern, size = Image2D(64, 8, 16, 4, 8), 128  # a tile is a block
    at = torch.arange(2048)
    pairs = pattern.allows(at[:, None], at).view(16, size, 16, size).any(3).any(1)
    first = torch.arange(0, 2048, size)
    found = pattern.tiles(first[:, None], first[:, None] + size - 1, first, first + size - 1)
    assert torch.equal(found, pairs)
