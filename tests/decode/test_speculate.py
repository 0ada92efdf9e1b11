"""Prompt-lookup speculation: the tokens of plain decoding, on every kind of state, with fewer steps."""

from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, END, PROMPTS, Counting, Letters, decoder, seq2seq, summing

from writehead.core.state import CannotRewind, rewind
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate
from writehead.decode.options import Options
from writehead.decode.result import Result
from writehead.decode.speculate import Lookup, Pace, Verifier

MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.1, "seed": 7, "top_p": 0.9},
    {"repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "num_return_sequences": 2},
    {"min_new_tokens": 12},
    {"cache_dtype": torch.int8},
]


def assert_same(a: Result, b: Result) -> None:
    for one, other in zip(a, b, strict=True):
        assert other.tokens == one.tokens
        assert (other.finish_reason, other.text) == (one.finish_reason, one.text)
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-9)


@pytest.mark.parametrize("values", MODES)
@pytest.mark.parametrize("mixer", CAUSAL)
def test_speculation_gives_the_tokens_of_plain_decoding(mixer: str, values: dict[str, Any]) -> None:
    model = decoder(mixer)
    options = Options(max_new_tokens=24, eos_token_id=END, **values)
    plain = generate(model, PROMPTS, options, tokenizer=Letters())
    drafted = 0
    for most in (1, 4):
        drafting = generate(model, PROMPTS, options, tokenizer=Letters(), prompt_lookup_num_tokens=most)
        assert_same(plain, drafting)
        drafted += drafting.timings.drafted_tokens
    assert drafted > 0


@pytest.mark.parametrize("values", MODES[:3])
def test_speculation_works_on_states_that_cannot_rewind(values: dict[str, Any]) -> None:
    model = summing()
    _, state = TorchEngine(model).start(torch.tensor([[1]]), Options().store)
    with pytest.raises(CannotRewind):
        rewind(state, 0)
    options = Options(max_new_tokens=24, eos_token_id=END, **values)
    drafting = generate(model, PROMPTS, options, prompt_lookup_num_tokens=4)
    assert_same(generate(model, PROMPTS, options), drafting)
    timings = drafting.timings
    assert 0 < timings.accepted_tokens < timings.drafted_tokens  # some were taken back


def test_speculation_works_on_an_encoder_decoder_model() -> None:
    values: dict[str, Any] = {"max_new_tokens": 24, "decoder_start_token_id": 1}
    plain = generate(seq2seq(), PROMPTS, **values)
    drafting = generate(seq2seq(), PROMPTS, prompt_lookup_num_tokens=3, **values)
    assert_same(plain, drafting)
    assert drafting.timings.drafted_tokens > 0


def test_a_stop_string_within_a_draft_ends_the_text_there() -> None:
    values: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": (), "tokenizer": Letters()}
    plain = generate(decoder(), PROMPTS, **values)
    texts = [g.text for g in plain if g.text]
    for stop in {text[n : n + 3] for text in texts for n in (3, 9)} - {""}:
        held = generate(decoder(), PROMPTS, stop_strings=[stop], **values)
        drafting = generate(decoder(), PROMPTS, stop_strings=[stop], prompt_lookup_num_tokens=6, **values)
        assert "stop" in {g.finish_reason for g in held}
        assert_same(held, drafting)


def test_repeated_text_takes_fewer_steps_and_the_report_adds_up() -> None:
    engine = Counting(decoder(seed=0))  # says the same token over and over
    result = generate(engine, [[4]], max_new_tokens=41, prompt_lookup_num_tokens=8)
    timings = result.timings
    assert timings.decode_tokens == 40 == timings.decode_steps + timings.accepted_tokens
    assert timings.decode_steps == engine.calls <= 12
    assert engine.stepped == timings.decode_steps + timings.drafted_tokens


def test_drafts_never_reach_beyond_the_limit_or_the_position_table() -> None:
    engine = Counting(decoder(position="learned", seed=0))
    result = generate(engine, [[4] * 55], max_new_tokens=10, prompt_lookup_num_tokens=8)
    assert len(result[0].tokens) == 10
    assert engine.prefilled + engine.stepped >= 64
    assert result.timings.drafted_tokens > 0


@pytest.mark.parametrize("model", [decoder("local_mqa"), summing()], ids=["ring", "sum"])
def test_taking_back_leaves_the_state_of_the_tokens_that_held(model: Any) -> None:
    store = Options(prompt_lookup_num_tokens=3).store
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, -1]])
    engine = TorchEngine(model)
    verifier = Verifier(engine, engine.start(tokens, store)[1])
    verifier.feed([7, 8], [[1, 2, 3], [4]])
    verifier.take_back([2, 1])
    after = verifier.feed([9, 9], [[], []])
    held = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 1], [3, 4, 5, 6, 7, 8, -1, -1]])
    _, state = engine.start(held, store)
    expected, _ = engine.step(torch.tensor([9, 9]), state)
    torch.testing.assert_close(after[:, 0], expected, atol=1e-10, rtol=0)


def test_the_longest_and_latest_earlier_match_is_continued() -> None:
    text = [1, 2, 3, 9, 5, 2, 3, 8, 2, 3]
    assert Lookup(text, 4).draft(4) == [8, 2, 3, 8]  # the latest "2 3"
    assert Lookup([*text[:-2], 1, 2, 3], 4).draft(4) == [9, 5, 2, 3]  # the longer "1 2 3"
    assert Lookup([7, 8, 8, 8], 4).draft(4) == [8, 8, 8, 8]  # the match reaches into its own end
    assert Lookup([5, 7, 8, 7, 8], 4).draft(4) == [7, 8, 7, 8]
    assert Lookup(text, 4).draft(2) == [8, 2]
    assert Lookup(text, 1).draft(4) == [8]
    assert Lookup([1, 2, 3, 4], 4).draft(4) == []
    assert Lookup([1, 2, 3, 2], 4).draft(4) == []  # one token alone is no match
    assert Lookup([], 4).draft(4) == []
    assert Lookup(text, 4).draft(0) == []


def test_text_that_goes_on_is_looked_up_too() -> None:
    lookup = Lookup([1, 2], 4)
    assert lookup.draft(4) == []
    lookup.extend([3, 1, 2])
    assert lookup.draft(3) == [3, 1, 2]


def test_drafts_shrink_when_they_fail_and_grow_when_they_hold() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], 8)
    assert len(lookup.draft(8)) == 8
    lookup.judge(8, 1)
    assert lookup.draft(8) == [3, 4]
    lookup.judge(2, 0)
    assert lookup.draft(8) == [3]
    lookup.judge(0, 0)
    assert lookup.draft(8) == [3]
    for drafted, expected in ((1, 2), (2, 4), (4, 8), (8, 8)):
        lookup.judge(drafted, drafted)
        assert len(lookup.draft(8)) == expected


def paced(costs: dict[int, float], share: float, rows: int = 1) -> Pace:
    """A pace that has seen these seconds of calls, and this share of drafted tokens hold."""
    pace = Pace()
    for tokens, seconds in costs.items():
        for delay in (0.5, 0.0, 0.2):  # noise only adds
            pace.took(rows, tokens, seconds + delay)
    for _ in range(200):
        pace.judged(100, round(100 * share)) if share == 1 else pace.judged(1, 0)
        for _ in range(round(share / (1 - share)) if share < 1 else 0):
            pace.judged(1, 1)
    return pace


@pytest.mark.parametrize(
    ("costs", "share", "length"),
    [
        ({1: 1.0, 9: 1.2}, 1.0, 8),  # nearly free
        ({1: 1.0, 9: 9.5}, 1.0, 0),  # a token of a draft costs more than a step
        ({1: 1.0, 9: 8.5}, 1.0, 8),
        ({1: 1.0, 3: 1.1, 9: 9.0}, 0.75, 2),  # cheap up to three tokens
        ({1: 1.0, 2: 1.7, 9: 9.0}, 0.5, 0),  # the break-even of one draft is at 0.7
        ({1: 1.0, 2: 1.3, 9: 9.0}, 0.5, 1),
        ({1: 1.0, 2: 1.3}, 0.5, 8),  # what was never tried is, once
    ],
)
def test_drafts_are_as_long_as_their_cost_and_their_luck_pay(
    costs: dict[int, float], share: float, length: int
) -> None:
    assert paced(costs, share).longest([8]) == length


def test_the_gain_of_all_rows_is_weighed_against_one_cost() -> None:
    pace = paced({1: 1.0, 5: 1.9}, 0.75, rows=4)
    assert pace.longest([4, 4, 4, 4]) == 3
    assert pace.longest([4, 0, 0, 0]) == 0


def test_plain_steps_are_measured_once_drafts_fail_or_after_three_of_them() -> None:
    failing, holding = Pace(), Pace()
    assert failing.longest([8]) == holding.longest([8]) == 8
    for _ in range(3):
        assert holding.longest([8]) == 8
        failing.judged(8, 0)
        holding.took(1, 9, 1.0)
    assert failing.longest([8]) == holding.longest([8]) == 0


def test_another_number_of_rows_is_measured_anew() -> None:
    pace = paced({1: 1.0, 9: 9.5}, 1.0)
    pace.took(2, 9, 1.0)
    assert pace.longest([8, 8]) == 8


class Priced(Counting):
    """An engine that takes as long as a price list says, by a clock of its own."""

    def __init__(self, model: Any, price: float, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(model)
        self.price, self.now = price, 0.0
        monkeypatch.setattr("writehead.decode.loop.time.perf_counter", lambda: self.now)

    def _count(self, tokens: torch.Tensor) -> None:
        super()._count(tokens)
        self.now += 1.0 if tokens.dim() == 1 else 1.0 + self.price * (tokens.shape[1] - 1)


@pytest.mark.parametrize(("price", "wins"), [(0.05, True), (0.5, True), (1.5, False)])
def test_speculation_is_used_where_its_cost_pays_and_given_up_where_not(
    price: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(seed=0)  # says the same token over and over, so that drafts hold
    engine = Priced(model, price, monkeypatch)
    plain = generate(model, [[4]], max_new_tokens=201)
    monkeypatch.setattr("writehead.decode.loop.time.perf_counter", lambda: engine.now)
    result = generate(engine, [[4]], max_new_tokens=201, prompt_lookup_num_tokens=8)
    assert result[0].tokens == plain[0].tokens
    if wins:
        assert engine.now < 200 * (1 + 8 * price) / 9 * 1.25
    else:
        assert engine.now < 200 * 1.15
        assert 0 < result.timings.drafted_tokens < 60


def test_drafts_that_fail_are_given_up_and_taken_up_again_when_the_text_repeats() -> None:
    pace = paced({1: 1.0, 2: 1.5, 9: 2.0}, 0.0)
    assert pace.longest([8]) == 0
    for _ in range(40):
        pace.judged(1, 1)  # seen without being fed
    assert pace.longest([8]) == 8
