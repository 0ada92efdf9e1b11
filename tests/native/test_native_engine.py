"""The native engine against the PyTorch engine and against itself: its laws at float32 rounding."""

import copy
import random
from typing import Any

import pytest
import torch
from tiny_native import CAUSAL, FLIPS, PROMPTS, ROUNDING, built, close, native, padded, play, single

from writehead.core.slots import Store
from writehead.core.state import CannotRewind, join, nbytes, rewind, select
from writehead.decode.engine import TorchEngine
from writehead.native import kernels
from writehead.native.covers import why_not
from writehead.native.engine import NativeEngine
from writehead.native.weights import pack_model

SCHEMES = ["none", "sinusoidal", "learned", "rotary", "alibi"]
MIXERS = [name for name in CAUSAL if why_not(single(name).config) is None]


def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_every_head_sharing_row_of_the_catalog_is_covered() -> None:
    assert {"mha", "gqa", "mqa", "local_mha", "local_mqa", "sink_mqa"} <= set(MIXERS)


@pytest.mark.parametrize("position", SCHEMES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_it_gives_the_logits_of_pytorch(mixer: str, position: str) -> None:
    model = single(mixer, position)
    ours, theirs = native(model), TorchEngine(model)
    a, one = ours.start(padded(PROMPTS), Store())
    b, other = theirs.start(padded(PROMPTS), Store())
    close(a, b)
    for t in range(20):
        a, one = ours.step(draw(4, 1, t)[:, 0], one)
        b, other = theirs.step(draw(4, 1, t)[:, 0], other)
        close(a, b)
    close(ours.verify(draw(4, 9), one)[0], theirs.verify(draw(4, 9), other)[0])


VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {"stack": {"name": "residual", "order": "parallel", "norm": "layer"}},
    "one norm": {"stack": {"name": "residual", "order": "parallel", "one_norm": True}},
    "layer norm without bias, no last norm": {
        "stack": {"name": "residual", "norm": "layer_no_bias", "last_norm": False}
    },
    "untied": {"tie_embeddings": False, "head_bias": True},
    "scales": {"embed_scale": 1.7, "logit_scale": 0.3, "embed_norm": True},
    "head norms": {"mixer": {"name": "gqa", "heads": 4, "qk_norm": 1e-6, "scale": 0.4}},
    "wide heads, biases": {"mixer": {"name": "mha", "heads": 3, "head_dim": 10, "bias": "all"}},
    "windows in turns": {
        "depth": 5,
        "mixer": (
            {"name": "mqa", "heads": 4},
            {"name": "local_mqa", "heads": 4, "pattern": {"name": "window", "window": 3}},
            {"name": "mha", "heads": 4, "pattern": {"name": "window", "window": 20}},
        ),
    },
    "part of a head turns, in pairs": {
        "position": {"name": "rotary", "rotary_dim": 2, "pairs": "interleaved", "base": 500.0}
    },
    "scaled rotation": {
        "position": {"name": "rotary", "scaling": {"name": "yarn", "factor": 4.0, "original_context": 16}}
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_that_it_covers_gives_the_logits_of_pytorch(variant: str) -> None:
    model = built(5, **VARIANTS[variant])
    ours, theirs = native(model), TorchEngine(model)
    for calls in ([draw(3, 25)], [draw(3, 6), draw(3, 1, 1), draw(3, 1, 2), draw(3, 17, 3)]):
        (first, one), (other, two) = (engine.start(draw(3, 12), Store()) for engine in (ours, theirs))
        (found, _), (right, _) = play(ours, one, calls), play(theirs, two, calls)
        for a, b in zip([first, *found], [other, *right], strict=True):
            close(a, b)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "identity"])
@pytest.mark.parametrize("name", ["dense", "chunked"])
def test_every_activation_gives_the_logits_of_pytorch(name: str, activation: str, gated: bool) -> None:
    feed = {"name": name, "hidden": 23, "activation": activation, "gated": gated, "bias": True}
    model = built(3, feedforward=feed)
    for tokens in (draw(1, 1), draw(2, 7)):
        close(native(model).start(tokens, Store())[0], TorchEngine(model).start(tokens, Store())[0])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_text_in_any_pieces_gives_what_it_gives_at_once(mixer: str) -> None:
    engine, text, plain = native(single(mixer)), draw(3, 41), random.Random(0)
    whole, state = play(engine, engine.start(text[:, :1], Store())[1], [text[:, 1:]])
    after, _ = engine.step(draw(3, 1)[:, 0], state)
    for parts in (1, 2, 3, 10, 40):
        cuts = sorted(plain.sample(range(1, 40), parts - 1))
        pieces = [text[:, 1 + a : 1 + b] for a, b in zip([0, *cuts], [*cuts, 40], strict=True)]
        found, state = play(engine, engine.start(text[:, :1], Store(capacity=7 * parts))[1], pieces)
        close(torch.cat([f.view(3, -1, 11) for f in found], 1), whole[0].view(3, -1, 11))
        close(engine.step(draw(3, 1)[:, 0], state)[0], after)


@pytest.mark.parametrize("mixer", ["gqa", "sink_mqa"])
def test_a_long_prompt_goes_in_as_in_one_call_whatever_its_neighbours(mixer: str) -> None:
    engine, text = native(single(mixer)), draw(1, 700)
    alone, state = engine.start(text, Store())
    for others in (1, 3):
        rows = torch.full((1 + others, 700), -1)
        rows[0], rows[1:, :5] = text[0], draw(others, 5)
        among, both = engine.start(rows, Store())
        close(among[:1], alone)
        close(
            engine.step(torch.tensor([3] + [-1] * others), both)[0][:1],
            engine.step(torch.tensor([3]), select(state, torch.tensor([0])))[0],
        )


@pytest.mark.parametrize("mixer", ["mha", "local_mqa"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing_but_its_own_output(mixer: str, left: bool) -> None:
    engine = native(single(mixer))
    logits, state = engine.start(padded(PROMPTS, left), Store())
    following, _ = engine.step(torch.tensor([3, 1, 4, 1]), state)
    for i, prompt in enumerate(PROMPTS):
        alone, one = engine.start(torch.tensor([prompt]), Store())
        close(logits[i : i + 1], alone)
        close(following[i : i + 1], engine.step(torch.tensor([[3], [1], [4], [1]][i]), one)[0])


def test_padding_between_tokens_is_passed_over_and_an_idle_row_remembers_nothing() -> None:
    engine = native(single("gqa"))
    _, state = engine.start(draw(2, 4), Store())
    gaps = torch.tensor([[-1, 5, -1, -1, 6], [-1, -1, -1, -1, -1]])
    logits, state = engine.verify(gaps, state)
    assert not logits[0, [0, 2, 3]].any()
    assert not logits[1].any()
    assert not engine.step(torch.tensor([-1, -1]), select(state, torch.arange(2)))[0].any()
    _, other = engine.start(draw(2, 4), Store())
    right, other = engine.verify(torch.tensor([[5, 6], [-1, -1]]), other)
    close(logits[0, [1, 4]], right[0])
    close(engine.step(torch.tensor([7, 7]), state)[0], engine.step(torch.tensor([7, 7]), other)[0])


@pytest.mark.parametrize(
    "store", [Store(), Store(dtype=torch.bfloat16), Store(dtype=torch.int8), Store(slack=9)], ids=str
)
@pytest.mark.parametrize("mixer", ["gqa", "local_mqa"])
def test_rows_may_be_moved_repeated_dropped_and_joined(mixer: str, store: Store) -> None:
    engine, more = native(single(mixer)), draw(5, 4, 7)
    bound = ROUNDING if store.dtype is None else FLIPS
    _, state = engine.start(padded(PROMPTS), store)
    right, _ = engine.verify(more[:4], select(state, torch.arange(4)))
    for rows in ([3, 1, 0, 2], [1, 1, 0, 2, 2], [2]):
        again, _ = engine.verify(more[rows], select(state, torch.tensor(rows)))
        for i, row in enumerate(rows):
            close(again[i], right[row], bound)
    _, first = engine.start(padded(PROMPTS[:1]), store)
    _, rest = engine.start(padded(PROMPTS[1:]), Store(capacity=100, slack=store.slack, dtype=store.dtype))
    for a, b, order in ((first, rest, [0, 1, 2, 3]), (rest, first, [1, 2, 3, 0])):
        both, _ = engine.verify(more[order], join(select(a, torch.arange(len(a.next))), b))
        close(both, right[order], bound)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_rewound_state_is_the_one_before(mixer: str, dtype: torch.dtype | None) -> None:
    engine, store, later = native(single(mixer)), Store(slack=6, dtype=dtype), draw(3, 5, 2)
    bound = ROUNDING if dtype is None else FLIPS
    for counts in ([1, 1, 1], [6, 0, 3], [4, 4, 4]):
        _, state = engine.start(draw(3, 30), store)
        right, _ = engine.verify(later, select(state, torch.arange(3)))
        extra = torch.full((3, 6), -1)
        for row, count in enumerate(counts):
            extra[row, :count] = draw(1, count, row)
        _, state = engine.verify(extra, state)
        again, _ = engine.verify(later, rewind(state, torch.tensor(counts)))
        close(again, right, bound)


def test_a_state_goes_on_while_another_outgrows_the_angles_that_it_was_bound_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "FIRST_TURNS", 32)
    engine = native(single("gqa"))
    (_, short), (_, right) = (engine.start(draw(2, 3), Store(capacity=40)) for _ in range(2))
    engine.start(draw(1, 60), Store())
    for t in range(30):
        assert torch.equal(*(engine.step(draw(2, 1, t)[:, 0], state)[0] for state in (short, right)))
        right = select(right, torch.arange(2))  # bound anew at every step


def test_tokens_of_another_whole_type_are_the_same_tokens() -> None:
    engine = native(single("gqa"))
    (a, one), (b, other) = (engine.start(draw(2, 4).to(kind), Store()) for kind in (torch.int64, torch.int32))
    assert torch.equal(a, b)
    assert torch.equal(
        engine.step(draw(2, 1)[:, 0], one)[0], engine.step(draw(2, 1)[:, 0].to(torch.int16), other)[0]
    )


def test_a_deep_copy_goes_its_own_way() -> None:
    engine = native(single("local_mqa"))
    _, state = engine.start(draw(2, 4), Store())
    twin = copy.deepcopy(state)
    for t in range(9):
        assert torch.equal(*(engine.step(draw(2, 1, t)[:, 0], one)[0] for one in (state, twin)))


def test_a_token_that_does_not_exist_changes_nothing() -> None:
    engine, later = native(single("gqa")), draw(2, 3, 1)
    _, state = engine.start(draw(2, 4), Store())
    right, _ = engine.verify(later, select(state, torch.arange(2)))
    for wrong in ([3, 11], [11, -1]):
        with pytest.raises(ValueError, match=r"token 11 is not in the vocabulary of 11 \(0 to 10\)"):
            engine.step(torch.tensor(wrong), state)
    assert torch.equal(engine.verify(later, state)[0], right)


def test_a_ring_says_when_it_cannot_rewind() -> None:
    engine = native(single("local_mqa"))
    _, state = engine.start(draw(1, 60), Store(slack=2))
    with pytest.raises(CannotRewind, match="no longer holds what was read before the last 40 tokens"):
        rewind(state, 40)
    _, state = engine.start(draw(1, 3), Store())
    with pytest.raises(ValueError, match="cannot take back"):
        rewind(state, 4)


@pytest.mark.parametrize(
    "store",
    [
        Store(),
        Store(capacity=20),
        Store(capacity=90),
        Store(dtype=torch.int8),
        Store(dtype=torch.bfloat16, slack=30),
    ],
    ids=str,
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_reported_state_bytes_are_those_held(mixer: str, store: Store) -> None:
    engine = native(single(mixer))
    for context in (1, 16, 17, 40, 100):
        _, state = engine.start(draw(3, context), store)
        assert engine.state_bytes(3, context, store) == nbytes(state)


@pytest.mark.parametrize("mixer", ["gqa", "sink_mqa"])
def test_caches_in_fewer_bits_give_what_those_of_pytorch_give(mixer: str) -> None:
    model = single(mixer)
    for dtype, bound in ((torch.bfloat16, 0.02), (torch.int8, 0.05)):
        store = Store(dtype=dtype)
        ours, theirs = native(model), TorchEngine(model)
        found, _ = play(ours, ours.start(draw(2, 20), store)[1], [draw(2, 1, 1), draw(2, 4, 2)])
        right, _ = play(theirs, theirs.start(draw(2, 20), store)[1], [draw(2, 1, 1), draw(2, 4, 2)])
        exact, _ = play(theirs, theirs.start(draw(2, 20), Store())[1], [draw(2, 1, 1), draw(2, 4, 2)])
        for a, b, c in zip(found, right, exact, strict=True):
            assert (b - c).abs().max() > 1e-4, "the cache's rounding must show"
            assert (a - b).abs().max() < bound * (b - c).abs().max(), "but be the same"


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 130])
def test_any_number_of_rows_gives_the_logits_of_pytorch(rows: int) -> None:
    model = single("gqa")
    ours, theirs = native(model), TorchEngine(model)
    a, one = ours.start(draw(rows, 5), Store())
    b, other = theirs.start(draw(rows, 5), Store())
    close(a, b)
    close(ours.step(draw(rows, 1)[:, 0], one)[0], theirs.step(draw(rows, 1)[:, 0], other)[0])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    model = single("mqa")
    engine, one = native(model, threads), native(model, 1)
    assert engine.threads == threads
    close(engine.start(draw(2, 150), Store())[0], one.start(draw(2, 150), Store())[0])


def test_a_table_that_is_only_looked_up_does_not_count_as_read() -> None:
    for values in ({}, {"tie_embeddings": False}, {"position": "learned"}):
        model = single(**values)
        matrices = [
            m
            for name, m in native(model).model.matrices.items()
            if name != "embedding.table" or values.get("tie_embeddings") is not False
        ]
        vectors = [v for name, v in native(model).model.vectors.items() if name != "embedding.position.table"]
        assert native(model).weight_bytes() == sum(m.nbytes for m in matrices) + sum(
            v.nbytes for v in vectors
        )


def test_the_engine_knows_the_models_limits() -> None:
    engine = native(single(position="learned", max_context=32))
    assert (engine.vocab, engine.positions, engine.trained_context, engine.reads_source) == (
        11,
        64,
        32,
        False,
    )
    assert engine.memory_bytes(3, 5) == 0


def test_what_cannot_be_run_is_refused() -> None:
    engine = native(single(position="learned"))
    with pytest.raises(ValueError, match="row 1 has no token to start from"):
        engine.start(torch.tensor([[1, 2], [-1, -1]]), Store())
    with pytest.raises(ValueError, match="this model has no encoder"):
        engine.start(torch.tensor([[1]]), Store(), torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"token 11 is not in the vocabulary of 11 \(0 to 10\)"):
        engine.start(torch.tensor([[1, 11]]), Store())
    with pytest.raises(ValueError, match="position 64 does not exist"):
        engine.start(draw(1, 65), Store())
    with pytest.raises(ValueError, match=r"keeps caches in float32, bfloat16 or int8; got torch.float16"):
        engine.start(draw(1, 2), Store(dtype=torch.float16))
    with pytest.raises(ValueError, match="threads=0 must be at least 1"):
        native(single(), threads=0)
    _, a = engine.start(draw(1, 2), Store())
    _, b = engine.start(draw(1, 2), Store(dtype=torch.int8))
    with pytest.raises(ValueError, match="cannot join caches of different kinds"):
        join(a, b)


def test_without_a_library_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_model(single(), "float32")
    monkeypatch.setattr(kernels, "library", lambda: (None, "there was no compiler"))
    with pytest.raises(ValueError, match="the native engine cannot run here: there was no compiler"):
        NativeEngine(packed)


def test_threads_or_memory_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = native(single())

    class Poor:
        """A library that gets nothing."""

        wh_engine_create = staticmethod(lambda model, threads: None)
        wh_step = staticmethod(lambda engine, call: -1)

    monkeypatch.setattr(engine._kernels, "_library", Poor())
    with pytest.raises(MemoryError, match="no memory for a step of 2 rows of 3 tokens"):
        engine.start(draw(2, 3), Store())
    monkeypatch.setattr(kernels, "library", lambda: (Poor(), "poor"))
    with pytest.raises(ValueError, match="could not start 7 threads; give fewer"):
        native(single(), threads=7)
