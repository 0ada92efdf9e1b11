"""Token choice: filters against transformers and plain loops, draws against the exact distribution."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from writehead.decode.filters import row_generators
from writehead.decode.options import Sampling
from writehead.decode.sampling import Rows, draw, filtered_logprobs, mark, penalise, pick

SIGNIFICANCE = 1e-4  # chance that a right implementation fails a chi-square test; the seeds are fixed
DRAWS = 100_000

FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.1},
]


def exact(logits: Sequence[float], sampling: Sampling, seen: Sequence[int] = ()) -> list[float]:
    """The probabilities to draw from, by loops over the definitions; logits must be distinct."""

    def shares(scores: dict[int, float]) -> dict[int, float]:
        top = max(scores.values())
        total = sum(math.exp(s - top) for s in scores.values())
        return {i: math.exp(s - top) / total for i, s in scores.items()}

    scores = {i: x for i, x in enumerate(logits) if x > -math.inf}
    for i in set(seen) & set(scores):
        penalty = sampling.repetition_penalty
        scores[i] = scores[i] * penalty if scores[i] < 0 else scores[i] / penalty
    scores = {i: s / sampling.temperature for i, s in scores.items()}
    best_first = sorted(scores, key=lambda i: (-scores[i], i))
    if sampling.top_k:
        best_first = best_first[: sampling.top_k]
    shared = shares({i: scores[i] for i in best_first})
    nucleus, mass = [], 0.0
    for i in best_first:
        if nucleus and mass >= sampling.top_p:
            break
        nucleus.append(i)
        mass += shared[i]
    shared = shares({i: scores[i] for i in nucleus})
    best = max(shared.values())
    shared = shares({i: scores[i] for i in nucleus if shared[i] >= sampling.min_p * best})
    return [shared.get(i, 0.0) for i in range(len(logits))]


def theirs(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is not installed"
    )
    steps = []
    if seen is not None:
        steps.append(process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(process.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        logits = step(seen, logits)
    return logits.log_softmax(-1)


def random_logits(B: int, V: int, seed: int) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("V", [7, 300, 4000])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_those_of_transformers(options, V):
    sampling, logits = Sampling(**options), random_logits(6, V, seed=V)
    torch.testing.assert_close(
        filtered_logprobs(logits, sampling), theirs(logits, sampling), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_those_of_transformers_with_removed_tokens(options):
    sampling, logits = Sampling(**options), random_logits(6, 300, seed=1)
    logits[random_logits(6, 300, seed=2) > 1] = -torch.inf
    logits[5, 1:] = -torch.inf
    torch.testing.assert_close(
        filtered_logprobs(logits, sampling), theirs(logits, sampling), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("V", [9, 300])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_keep_as_many_of_equal_tokens_as_transformers(options, V):
    sampling, logits = Sampling(**options), random_logits(6, V, seed=3).round()
    logits[4] = 0.0
    logits[5, ::2] = -torch.inf
    ours, expected = filtered_logprobs(logits, sampling), theirs(logits, sampling)
    torch.testing.assert_close(ours.sort(-1).values, expected.sort(-1).values, rtol=1e-6, atol=1e-6)
    if sampling.top_p == 1:
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_top_p_keeps_the_lowest_ids_of_equal_tokens():
    kept = filtered_logprobs(torch.zeros(1, 8), Sampling(temperature=1.0, top_p=0.4)).isfinite()
    assert kept[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("V", [2, 4, 10, 50, 128])
@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_a_mass_that_just_reaches_top_p_keeps_as_many_tokens_as_transformers(top_p, V):
    sampling, logits = Sampling(temperature=1.0, top_p=top_p), torch.zeros(1, V)
    kept, expected = filtered_logprobs(logits, sampling).isfinite(), theirs(logits, sampling).isfinite()
    assert kept.sum() == expected.sum()


@given(
    logits=st.lists(st.floats(-20, 20), min_size=1, max_size=40, unique=True),
    top_k=st.integers(0, 45),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.1, 10),
)
@settings(derandomize=True, max_examples=25, deadline=None)
def test_filters_equal_their_definitions(logits, top_k, top_p, min_p, temperature):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = filtered_logprobs(torch.tensor([logits], dtype=torch.float64), sampling)[0].exp().tolist()
    assert ours == pytest.approx(exact(logits, sampling), abs=1e-9)


def test_filters_leave_the_logits_alone():
    logits = random_logits(2, 50, seed=4)
    before = logits.clone()
    filtered_logprobs(logits, Sampling(temperature=1.0, top_k=9, top_p=0.9, min_p=0.1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("penalty", [1.4, 0.6])
def test_penalty_and_filters_equal_those_of_transformers(penalty):
    logits, tokens = random_logits(4, 60, seed=5), torch.randint(0, 60, (4, 30))
    logits[1, 7] = -torch.inf
    sampling = Sampling(temperature=0.8, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=penalty)
    rows = Rows.start(sampling, range(4), vocab=60)
    rows.note(tokens[:, :20])
    for t in range(20, 30):
        rows.note(tokens[:, t])
    ours = filtered_logprobs(penalise(logits, rows.seen, penalty), sampling)
    torch.testing.assert_close(ours, theirs(logits, sampling, tokens), rtol=1e-6, atol=1e-6)


def test_padding_marks_nothing_as_seen():
    seen = torch.zeros(2, 5, dtype=torch.bool)
    mark(seen, torch.tensor([[-1, -1, 3], [1, 0, -1]]))
    mark(seen, torch.tensor([-1, 4]))
    assert seen.nonzero().tolist() == [[0, 3], [1, 0], [1, 1], [1, 4]]


LOGITS = [1.5, -0.3, 2.2, 0.1, -math.inf, 0.9, -2.0, 1.1, 2.0, -1.0, 0.4, -0.7]
SEEN = [2, 6, 8]


def counts(sampling: Sampling, batch: int = 1000) -> list[int]:
    """How often each token comes in DRAWS draws, from many rows with the same logits."""
    rows = Rows.start(sampling, range(batch), vocab=len(LOGITS))
    rows.note(torch.tensor([SEEN] * batch))
    logits = torch.tensor([LOGITS])
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, rows.seen[:1], sampling.repetition_penalty)
    logprobs = filtered_logprobs(logits, sampling).expand(batch, -1)
    tokens = torch.cat([draw(logprobs, rows.generators) for _ in range(DRAWS // batch)])
    return tokens.bincount(minlength=len(LOGITS)).tolist()


def chi_square(observed: Sequence[float], probabilities: Sequence[float]) -> float:
    """The chance of counts at least this far from the probabilities; 0 if an impossible token was drawn."""
    total = sum(observed)
    if any(o and not p for o, p in zip(observed, probabilities, strict=True)):
        return 0.0
    cells = [(o, p * total) for o, p in zip(observed, probabilities, strict=True) if p]
    return float(stats.chi2.sf(sum((o - e) ** 2 / e for o, e in cells), max(len(cells) - 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.25},
        {"temperature": 1.0, "repetition_penalty": 1.8},
        {"temperature": 1.4, "top_k": 8, "top_p": 0.9, "min_p": 0.3, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(options):
    sampling = Sampling(seed=11, **options)
    expected = exact(LOGITS, sampling, SEEN if sampling.repetition_penalty != 1 else ())
    assert chi_square(counts(sampling), expected) > SIGNIFICANCE


@pytest.mark.slow
def test_the_chi_square_test_tells_close_distributions_apart():
    drawn = counts(Sampling(temperature=1.0, seed=11))
    assert chi_square(drawn, exact(LOGITS, Sampling(temperature=1.05))) < SIGNIFICANCE
    assert chi_square(drawn, exact(LOGITS, Sampling(temperature=1.0, top_k=10))) == 0


@pytest.mark.parametrize("options", [*FILTERS, {"temperature": 1.0, "repetition_penalty": 1.3}], ids=str)
def test_picking_is_penalising_filtering_and_drawing(options):
    sampling, logits = Sampling(seed=2, **options), random_logits(40, 300, seed=12)
    rows, twin = (Rows.start(sampling, range(40), vocab=300) for _ in range(2))
    rows.note(torch.arange(150).expand(40, 150))
    scores = logits if rows.seen is None else penalise(logits, rows.seen, sampling.repetition_penalty)
    for _ in range(3):
        expected = draw(filtered_logprobs(scores, sampling), twin.generators)
        assert pick(logits, sampling, rows)[0].tolist() == expected.tolist()


def sequence(seed: int, numbers: Sequence[int], steps: int = 20) -> list[list[int]]:
    """Tokens of each row; the logits of a step depend on the row's number, not on its place."""
    sampling = Sampling(temperature=1.0, top_k=60, top_p=0.95, min_p=0.001, seed=seed)
    rows = Rows.start(sampling, numbers, vocab=100)
    logits = torch.stack([random_logits(steps, 100, seed=n) for n in numbers])
    return torch.stack([pick(logits[:, t], sampling, rows)[0] for t in range(steps)], 1).tolist()


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    assert sequence(1, range(3)) == sequence(1, range(3))
    assert sequence(1, range(3)) != sequence(2, range(3))


def test_a_row_draws_the_same_tokens_alone_and_anywhere_in_a_batch():
    batch = sequence(1, range(5))
    assert [sequence(1, [n])[0] for n in range(5)] == batch
    assert sequence(1, [3, 0, 4, 1, 2]) == [batch[n] for n in (3, 0, 4, 1, 2)]


def test_log_probabilities_of_a_row_are_bitwise_the_same_alone_and_in_a_batch():
    logits = random_logits(16, 5003, seed=6)
    sampling = Sampling(temperature=0.9, top_k=700, top_p=0.97, min_p=1e-4)
    alone = torch.cat([filtered_logprobs(row[None], sampling) for row in logits])
    assert torch.equal(alone, filtered_logprobs(logits, sampling))


@pytest.mark.parametrize(
    "streams", [[(3, 0), (3, 1)], [(3, 0), (4, 0)], [(0, 1), (1, 0)], [(3, 0), (3 + 2**32, 0)]]
)
def test_streams_of_two_rows_or_seeds_are_independent(streams):
    first, second = (
        np.array(row_generators(s, [n])[0].random_raw(20_000) >> np.uint64(61)) for s, n in streams
    )
    table = np.bincount(first * 8 + second, minlength=64)
    assert chi_square(table.tolist(), [1 / 64] * 64) > SIGNIFICANCE


def test_without_a_seed_each_start_has_its_own_and_tells_it():
    sampling = Sampling(temperature=1.0)
    a, b = (Rows.start(sampling, range(2), vocab=10) for _ in range(2))
    again = Rows.start(Sampling(temperature=1.0, seed=a.seed), range(2), vocab=10)
    assert a.seed != b.seed
    assert [g.random_raw() for g in a.generators] == [g.random_raw() for g in again.generators]


def test_selected_rows_keep_their_stream_and_what_they_saw():
    sampling = Sampling(temperature=1.0, repetition_penalty=1.5, seed=1)
    rows, twin = (Rows.start(sampling, range(3), vocab=10) for _ in range(2))
    rows.note(torch.tensor([4, 5, 6]))
    kept = rows.select([2, 0])
    assert kept.seen.nonzero().tolist() == [[0, 6], [1, 4]]
    assert [g.random_raw() for g in kept.generators] == [twin.generators[i].random_raw() for i in (2, 0)]
    kept.note(torch.tensor([1, 1]))
    assert rows.seen.nonzero().tolist() == [[0, 4], [1, 5], [2, 6]]


def test_taking_a_row_twice_is_refused_unless_greedy():
    with pytest.raises(ValueError, match="row 1 is taken twice: two rows cannot draw from one random stream"):
        Rows.start(Sampling(temperature=1.0), range(3), vocab=10).select([1, 0, 1])
    penalised = Rows.start(Sampling(repetition_penalty=2.0), range(2), vocab=3)
    penalised.note(torch.tensor([0, 2]))
    assert penalised.select([1, 1]).seen.nonzero().tolist() == [[0, 2], [1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy_takes_the_lowest_id_among_equal_logits(dtype):
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-torch.inf, -1.0, -5.0, -1.0]], dtype=dtype
    )
    tokens, _ = pick(logits, Sampling(), Rows.start(Sampling(), range(3), vocab=4))
    assert tokens.tolist() == [1, 0, 1]
    assert filtered_logprobs(logits, Sampling()).exp().argmax(-1).tolist() == [1, 0, 1]
    assert filtered_logprobs(logits, Sampling()).exp().sum(-1).tolist() == [1, 1, 1]


def test_greedy_obeys_the_repetition_penalty():
    sampling = Sampling(repetition_penalty=2.0)
    rows, chosen = Rows.start(sampling, range(1), vocab=4), []
    for _ in range(4):
        tokens, _ = pick(torch.tensor([[3.0, 2.0, 1.2, -1.0]]), sampling, rows)
        rows.note(tokens)
        chosen += tokens.tolist()
    assert chosen == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.5}], ids=str
)
def test_the_log_probability_is_the_models_own(options):
    sampling, logits = Sampling(seed=5, **options), random_logits(8, 40, seed=7)
    rows = Rows.start(sampling, range(8), vocab=40)
    rows.note(torch.arange(40).expand(8, 40))
    tokens, logprobs = pick(logits, sampling, rows)
    for b in range(8):
        total = math.log(sum(math.exp(x) for x in logits[b].tolist()))
        assert logprobs[b].item() == pytest.approx(logits[b, tokens[b]].item() - total, abs=1e-5)


class Stuck:
    """A generator at one end of its range."""

    def __init__(self, raw: int) -> None:
        self.raw = raw

    def random_raw(self) -> int:
        return self.raw


@pytest.mark.parametrize(("raw", "token"), [(0, 2), (2**64 - 1, 5)])
def test_the_ends_of_the_random_range_never_draw_a_token_without_mass(raw, token):
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, -torch.inf, 0.3, 0.2, -torch.inf, -torch.inf]])
    for scale in (0.0, -3.3, 2.7):  # the total mass need not be one
        assert draw(logits + scale, [Stuck(raw)]).tolist() == [token]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1)], ids=str
)
@pytest.mark.parametrize("column", [0, 1, 31, 63, 64])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"row 1: the model produced NaN logits"),
        (math.inf, r"row 1: the model produced \+inf logits"),
    ],
)
def test_a_bad_logit_in_any_place_is_refused(sampling, column, value, message):
    logits = random_logits(3, 65, seed=8)
    logits[1, column] = value
    with pytest.raises(ValueError, match=message):
        pick(logits, sampling, Rows.start(sampling, range(3), vocab=65))


def test_filters_refuse_a_bad_row_too():
    sampling = Sampling(temperature=1.0, top_k=2)
    with pytest.raises(ValueError, match="row 1: the model produced NaN logits"):
        filtered_logprobs(torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 2.0]]), sampling)
    with pytest.raises(ValueError, match="row 0: every logit is -inf"):
        filtered_logprobs(torch.full((1, 3), -torch.inf), sampling)


def test_a_row_without_any_token_left_is_refused():
    logits = random_logits(2, 10, seed=9)
    logits[0] = -torch.inf
    with pytest.raises(ValueError, match="row 0: every logit is -inf, so no token can be chosen"):
        pick(logits, Sampling(), Rows.start(Sampling(), range(2), vocab=10))


def test_drawing_needs_mass_and_one_generator_per_row():
    with pytest.raises(ValueError, match="row 1 cannot be drawn from: its probabilities add up to 0"):
        draw(torch.tensor([[0.0], [-torch.inf]]), row_generators(0, range(2)))
    with pytest.raises(ValueError, match="row 0 cannot be drawn from: its probabilities add up to nan"):
        draw(torch.tensor([[0.0, torch.nan]]), row_generators(0, range(1)))
    with pytest.raises(ValueError, match="row 0 cannot be drawn from: its probabilities add up to inf"):
        draw(torch.tensor([[0.0, 100.0]]), row_generators(0, range(1)))
    with pytest.raises(
        ValueError, match="2 rows of log-probabilities but 3 generators: each row needs its own"
    ):
        draw(torch.zeros(2, 4), row_generators(0, range(3)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "repetition_penalty": 1.5}], ids=str)
def test_a_batch_without_rows_gives_no_tokens(options):
    sampling = Sampling(**options)
    tokens, logprobs = pick(torch.zeros(0, 5), sampling, Rows.start(sampling, [], vocab=5))
    assert (tokens.tolist(), tokens.dtype, logprobs.tolist()) == ([], torch.int64, [])


def test_rows_started_for_another_sampling_are_refused():
    greedy = Rows.start(Sampling(), range(1), vocab=4)
    with pytest.raises(ValueError, match="1 rows of log-probabilities but 0 generators"):
        pick(torch.zeros(1, 4), Sampling(temperature=1.0), greedy)
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.5 needs rows that note what was seen"):
        pick(torch.zeros(1, 4), Sampling(repetition_penalty=1.5), greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature=-0\.5 must be 0 \(greedy\) or more; nearest is 0"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"temperature": "1"}, "temperature='1' must be a finite number"),
        ({"temperature": True}, "temperature=True must be a finite number"),
        (
            {"temperature": 1e-30},
            r"temperature=1e-30 is too small to sample with: give 0 \(greedy\) or at least 1e-06",
        ),
        ({"top_k": -1}, r"top_k=-1 must be a whole number of tokens, 0 \(off\) or more"),
        ({"top_k": 2.0}, r"top_k=2\.0 must be a whole number of tokens"),
        ({"top_p": 1.5}, r"top_p=1\.5 must lie between 0 and 1; nearest is 1\.0"),
        ({"top_p": math.nan}, "top_p=nan must be a finite number"),
        ({"min_p": -0.1}, r"min_p=-0\.1 must lie between 0 and 1; nearest is 0\.0"),
        ({"repetition_penalty": 0}, r"repetition_penalty=0 must be above 0; 1\.0 turns it off"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be a finite number"),
        ({"seed": -1}, "seed=-1 must be a whole number, 0 or more, or None"),
        ({"seed": 1.0}, r"seed=1\.0 must be a whole number"),
        (
            {"temperature": 0, "top_k": 5},
            r"top_k=5 has no effect at temperature=0 \(greedy\): give a temperature above 0",
        ),
        ({"temperature": 0, "top_p": 0.9}, r"top_p=0\.9 has no effect .* or leave top_p at 1\.0"),
        ({"temperature": 0, "min_p": 0.1}, r"min_p=0\.1 has no effect .* or leave min_p at 0\.0"),
    ],
)
def test_settings_out_of_range_are_refused_with_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"temperature": 1.0, **options})


def test_the_smallest_temperature_is_greedy_in_effect_and_finite():
    logits = random_logits(3, 50, seed=10) * 100
    logprobs = filtered_logprobs(logits, Sampling(temperature=1e-6))
    assert logprobs.argmax(-1).tolist() == logits.argmax(-1).tolist()
    assert not logprobs.isnan().any()
