"""Greedy and sampled decoding: equal to the definition, to rescoring and to itself in every batch."""

from typing import Any

import pytest
import torch
from tiny_models import (
    CAUSAL,
    END,
    PROMPTS,
    VOCAB,
    Counting,
    Letters,
    config,
    decoder,
    greedy,
    next_logprobs,
    seq2seq,
)

from writehead.core.slots import Store
from writehead.decode import limits
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate, stream
from writehead.decode.options import Options
from writehead.decode.result import Event, Result, Timings
from writehead.decode.sampling import Rows, penalise, pick

SCHEMES = ["none", "sinusoidal", "infused", "learned", "rotary", "alibi", "t5"]


def tokens(result: Result) -> list[list[int]]:
    return [generation.tokens for generation in result]


def assert_rescored(model: Any, result: Result, prompts: list[list[int]]) -> None:
    for generation in result:
        prompt = prompts[generation.prompt]
        own = next_logprobs(model, prompt + generation.tokens)[len(prompt) - 1 : -1]
        expected = own.gather(1, torch.tensor(generation.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(generation.logprobs, dtype=torch.float64), expected, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("mixer", CAUSAL)
def test_greedy_decoding_equals_its_definition_without_a_cache(mixer: str) -> None:
    model = decoder(mixer)
    result = generate(model, PROMPTS, max_new_tokens=12, eos_token_id=END)
    assert tokens(result) == [greedy(model, prompt, 12, eos=END) for prompt in PROMPTS]


@pytest.mark.parametrize("position", SCHEMES)
@pytest.mark.parametrize("mixer", CAUSAL)
def test_rescoring_a_text_gives_the_log_probabilities_of_generating_it(mixer: str, position: str) -> None:
    model = decoder(mixer, position)
    result = generate(model, PROMPTS, max_new_tokens=9, temperature=1.5, seed=3)
    assert len({tuple(g.tokens) for g in result}) == len(PROMPTS)
    assert_rescored(model, result, PROMPTS)


def test_log_probabilities_are_the_models_own_under_every_filter() -> None:
    model = decoder()
    sampling = {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.3, "min_new_tokens": 9}
    result = generate(model, PROMPTS, max_new_tokens=9, eos_token_id=[0, 3], seed=3, **sampling)
    assert_rescored(model, result, PROMPTS)


@pytest.mark.parametrize("values", [{}, {"temperature": 1.2, "seed": 5}])
def test_a_row_does_not_depend_on_its_neighbours(values: dict[str, Any]) -> None:
    model, prompt = decoder("local_mqa"), PROMPTS[0]
    options = {"max_new_tokens": 15, "eos_token_id": END} | values
    alone = generate(model, [prompt], **options)[0]
    for others in ([[4]], [[5, 6, 7, 8, 9, 10, 1], [2, 3]], [[2, 3], [5, 6, 7, 8, 9, 10, 1], [1] * 20]):
        among = generate(model, [prompt, *others], **options)[0]
        assert among.tokens == alone.tokens
        assert among.logprobs == pytest.approx(alone.logprobs, abs=1e-9)


def test_greedy_rows_are_the_same_in_any_order() -> None:
    model = decoder("gqa")
    straight = generate(model, PROMPTS, max_new_tokens=15, eos_token_id=END)
    turned = generate(model, PROMPTS[::-1], max_new_tokens=15, eos_token_id=END)
    assert tokens(turned)[::-1] == tokens(straight)


def test_decoding_computes_each_token_once() -> None:
    engine = Counting(decoder())
    generate(engine, PROMPTS, max_new_tokens=10)
    assert engine.prefilled == sum(map(len, PROMPTS))
    assert engine.stepped == len(PROMPTS) * (10 - 1)  # the last one is never fed back
    assert engine.calls == 9


def test_finished_rows_leave_the_batch() -> None:
    engine, eos = Counting(decoder()), END
    result = generate(engine, PROMPTS, max_new_tokens=30, eos_token_id=eos)
    lengths = sorted(len(g.tokens) for g in result)
    assert lengths[0] < lengths[-1]
    assert engine.stepped == sum(lengths) - len(lengths)
    assert engine.rows == [sum(n > step for n in lengths) for step in range(1, lengths[-1])]


def test_a_few_finished_rows_stay_idle_in_a_large_batch() -> None:
    prompts = [[a, b] for a in range(1, 5) for b in range(1, 5)]
    engine = Counting(decoder())
    result = generate(engine, prompts, max_new_tokens=25, eos_token_id=END)
    for prompt, generation in zip(prompts, result, strict=True):
        alone = generate(engine.model, [prompt], max_new_tokens=25, eos_token_id=END)[0]
        assert generation.tokens == alone.tokens
    assert engine.stepped == sum(len(g.tokens) - 1 for g in result)
    changes = sum(a != b for a, b in zip(engine.rows, engine.rows[1:], strict=False))
    assert 1 <= changes < len({len(g.tokens) for g in result})


def test_a_text_ends_with_its_end_token_or_at_the_limit() -> None:
    result = generate(decoder(), PROMPTS, max_new_tokens=12, eos_token_id=[5, END])
    assert {g.finish_reason for g in result} == {"eos", "length"}
    for g in result:
        ended = g.tokens[-1] in (5, END)
        assert g.finish_reason == ("eos" if ended else "length")
        assert ended or len(g.tokens) == 12
        assert not {5, END} & set(g.tokens[:-1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_ends_before_its_least_length(temperature: float) -> None:
    values: dict[str, Any] = {
        "max_new_tokens": 20,
        "eos_token_id": [0, END],
        "temperature": temperature,
        "seed": 1,
    }
    free = generate(decoder(), PROMPTS, **values)
    held = generate(decoder(), PROMPTS, min_new_tokens=5, **values)
    assert min(len(g.tokens) for g in free) < 5
    assert min(len(g.tokens) for g in held) >= 5
    assert all(not {0, END} & set(g.tokens[:5][:-1]) for g in held)
    assert any(g.finish_reason == "eos" for g in held)


def test_sampling_draws_what_the_filters_leave_of_the_whole_text() -> None:
    model = decoder()
    options = Options(temperature=0.9, top_k=5, repetition_penalty=1.4, seed=11, max_new_tokens=12)
    result = generate(model, [PROMPTS[2]], options)
    text, rows = list(PROMPTS[2]), Rows.start(options.sampling, [0], VOCAB)
    for _ in range(12):
        rows.seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        rows.note(torch.tensor([text]))
        with torch.inference_mode():
            logits = model(torch.tensor([text]))[0][:, -1]
        text.append(int(pick(logits, options.sampling, rows)[0]))
    assert result[0].tokens == text[len(PROMPTS[2]) :]


def test_greedy_decoding_with_a_repetition_penalty_equals_its_definition() -> None:
    model, text = decoder(), list(PROMPTS[0])
    for _ in range(10):
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, text] = True
        row = torch.tensor([text])
        with torch.inference_mode():
            logits = model(row)[0][:, -1]
        text.append(int(penalise(logits, seen, 1.6).argmax()))
    result = generate(model, [PROMPTS[0], [9]], max_new_tokens=10, repetition_penalty=1.6)
    assert result[0].tokens == text[3:]


def test_several_samples_of_a_prompt_share_its_prefill_and_differ() -> None:
    engine = Counting(decoder())
    result = generate(engine, PROMPTS, max_new_tokens=8, temperature=1.5, seed=2, num_return_sequences=3)
    assert engine.prefilled == sum(map(len, PROMPTS))
    assert [g.prompt for g in result] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(g.tokens) for g in result}) == 12
    assert_rescored(engine.model, result, PROMPTS)


def test_the_same_seed_gives_the_same_texts_and_another_seed_others() -> None:
    def texts(seed: int) -> list[list[int]]:
        return tokens(generate(decoder(), PROMPTS, max_new_tokens=10, temperature=1.5, seed=seed))

    assert texts(1) == texts(1) != texts(2)


def test_an_encoder_decoder_model_decodes_as_its_definition_says() -> None:
    model, engine = seq2seq(), Counting(seq2seq())
    result = generate(engine, PROMPTS, max_new_tokens=10, eos_token_id=END, decoder_start_token_id=1)
    for g, source in zip(result, PROMPTS, strict=True):
        text = [1]
        while len(text) < 11 and text[-1] != END:
            text.append(int(next_logprobs(model, text, source)[-1].argmax()))
        assert g.tokens == text[1:]
    assert engine.prefilled == len(PROMPTS)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.int8, 0.5)])
def test_caches_may_be_stored_in_another_type(dtype: torch.dtype, near: float) -> None:
    plain = generate(decoder(), PROMPTS, max_new_tokens=6)
    stored = generate(decoder(), PROMPTS, max_new_tokens=6, cache_dtype=dtype)
    for a, b in zip(plain, stored, strict=True):
        assert b.logprobs[1] == pytest.approx(a.logprobs[1], abs=near)
    assert (stored[0].logprobs == plain[0].logprobs) == (dtype == torch.float64)


def test_streamed_events_add_up_to_the_final_result() -> None:
    events: list[Event] = []
    options = Options(max_new_tokens=40, temperature=1.5, seed=4)
    result = generate(decoder(), PROMPTS, options, tokenizer=Letters(), callback=events.append)
    run = stream(decoder(), PROMPTS, options, tokenizer=Letters())
    assert list(run) == events
    assert [g.tokens for g in run.generations] == tokens(result)
    for row, generation in enumerate(result):
        own = [event for event in events if event.row == row]
        assert [event.token for event in own] == generation.tokens
        assert [event.logprob for event in own] == generation.logprobs
        assert "".join(event.text for event in own) == generation.text
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + [generation.finish_reason]
        ids = [t for t in generation.tokens if t > 1]
        assert generation.text == b"".join(map(Letters().token_bytes, ids)).decode(errors="replace")


def test_a_stream_can_be_left_and_shows_what_it_has() -> None:
    engine = Counting(decoder())
    run = stream(engine, [PROMPTS[0]], max_new_tokens=50)
    first = [next(run), next(run), next(run)]
    assert run.generations[0].tokens == [event.token for event in first]
    assert run.generations[0].finish_reason is None
    assert engine.calls == 2


def test_a_stop_string_ends_the_text_and_is_no_part_of_it() -> None:
    values: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": 4, "eos_token_id": ()}
    values["tokenizer"] = Letters()
    free = generate(decoder(), PROMPTS, **values)[2]
    assert free.text is not None
    stop = free.text[7:10]
    held = generate(decoder(), PROMPTS, stop_strings=[stop], **values)[2]
    assert held.text == free.text[: free.text.index(stop)]
    assert held.finish_reason == "stop"
    assert held.tokens == free.tokens[: len(held.tokens)]
    assert len(held.tokens) < len(free.tokens)


def test_end_tokens_come_from_the_tokenizer_unless_given() -> None:
    class Ends(Letters):
        eos = frozenset({END})

    values: dict[str, Any] = {"max_new_tokens": 30, "tokenizer": Ends()}
    assert "eos" in {g.finish_reason for g in generate(decoder(), PROMPTS, **values)}
    assert {g.finish_reason for g in generate(decoder(), PROMPTS, eos_token_id=(), **values)} == {"length"}


def test_a_text_of_its_own_loses_the_space_that_its_tokenizer_adds() -> None:
    class Spaced(Letters):
        strips_space = True
        pieces = (b"", b"", *[b" %c" % letter for letter in range(97, 97 + 9)])

    own = generate(
        seq2seq(), [[5, 6]], max_new_tokens=5, decoder_start_token_id=1, tokenizer=Spaced(), eos_token_id=()
    )[0]
    rest = generate(decoder(), [[5, 6]], max_new_tokens=5, tokenizer=Spaced(), eos_token_id=())[0]
    for g, start in ((own, ""), (rest, " ")):
        letters = [chr(95 + token) for token in g.tokens if token > 1]
        assert len(letters) > 2
        assert g.text == start + " ".join(letters)


def test_an_empty_prompt_starts_from_the_beginning_of_sequence_token() -> None:
    class Bare(Letters):
        bos = None

    started = generate(decoder(), [[]], max_new_tokens=5, tokenizer=Letters())[0]
    assert started.tokens == generate(decoder(), [[1]], max_new_tokens=5, tokenizer=Letters())[0].tokens
    for tokenizer in (None, Bare()):
        with pytest.raises(
            ValueError, match="prompt 1 is empty, and there is no beginning-of-sequence token"
        ):
            generate(decoder(), [[1], []], tokenizer=tokenizer)


def test_timings_count_tokens_steps_and_bytes() -> None:
    engine = TorchEngine(decoder())
    timings = generate(engine, PROMPTS, max_new_tokens=10).timings
    assert (timings.engine, timings.prefill_tokens) == ("torch", 13)
    assert (timings.decode_tokens, timings.decode_steps) == (4 * 9, 9)
    assert timings.weight_bytes == engine.weight_bytes()
    assert timings.state_bytes == engine.state_bytes(4, 4, Store(capacity=4))  # 13 / 4 prompt tokens and one
    assert timings.bytes_per_token == pytest.approx((timings.weight_bytes + timings.state_bytes) / 4)
    assert timings.bandwidth == pytest.approx(timings.bytes_per_token * 36 / timings.decode_seconds)
    assert timings.prefill_rate == pytest.approx(13 / timings.prefill_seconds)
    assert Timings("none").bytes_per_token == Timings("none").decode_rate == Timings("none").prefill_rate == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_model_gets_its_mode_back(training: bool) -> None:
    model = decoder().train(training)
    generate(model, PROMPTS, max_new_tokens=2)
    assert model.training is training
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, [])
    assert model.training is training


def test_logits_that_are_no_numbers_stop_decoding() -> None:
    model = decoder(tie_embeddings=False)
    with torch.no_grad():
        model.embedding.table[7] = torch.nan
    with pytest.raises(ValueError, match="row 2: the model produced NaN logits"):
        generate(model, [[1], [2], [7]], max_new_tokens=3)


def test_positions_that_end_are_checked_before_anything_is_computed() -> None:
    engine = Counting(decoder(position="learned"))
    assert (
        len(generate(engine, [[1] * 60], max_new_tokens=5)[0].tokens) == 5
    )  # the last one takes no position
    engine.prefilled = 0
    with pytest.raises(
        ValueError, match=r"need 65 positions, and this model has 64: max_new_tokens can be at most 5"
    ):
        generate(engine, [[1], [1] * 60], max_new_tokens=6)
    with pytest.raises(ValueError, match="has 64: shorten the prompt"):
        generate(engine, [[1] * 65], max_new_tokens=1)
    assert engine.prefilled == 0


def test_going_beyond_the_trained_context_warns() -> None:
    model = decoder(max_context=8)
    generate(model, [[1, 2, 3]], max_new_tokens=6)
    with pytest.warns(UserWarning, match="go beyond the 8 tokens that this model was made for"):
        result = generate(model, [[1, 2, 3]], max_new_tokens=7)
    assert len(result[0].tokens) == 7


def test_a_context_that_does_not_fit_in_memory_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counting(decoder())
    needed = 2 * engine.state_bytes(4, 10**9 + 7, Options(max_new_tokens=10**9).store)
    monkeypatch.setattr(limits, "available_memory", lambda: needed // 2)
    with pytest.raises(
        ValueError, match=r"decoding 4 rows of 1000000007 tokens needs .* GiB, and .* GiB are av"
    ):
        generate(engine, PROMPTS, max_new_tokens=10**9)
    assert engine.prefilled == 0


@pytest.mark.parametrize(
    ("prompts", "values", "message"),
    [
        ([], {}, "no prompts: give at least one"),
        ([[1], "ab"], {}, "prompt 1 must be a list of token ids; got str"),
        ([[1, 11]], {}, r"prompt 0: token 11 is not in the vocabulary \(0 to 10\)"),
        ([[1, -1]], {}, r"prompt 0: token -1 is not in the vocabulary \(0 to 10\)"),
        ([[1]], {"stop_strings": ["a"]}, "stop_strings need a tokenizer"),
        ([[1]], {"stop_strings": ["a", ""]}, "stop_strings: '' is not a string of at least one character"),
        ([[1]], {"stop_strings": "a"}, "stop_strings='a' must be a list of strings"),
        ([[1]], {"eos_token_id": 11}, "eos_token_id 11 is not in the vocabulary of 11"),
        ([[1]], {"eos_token_id": [-1]}, "must hold token ids, whole numbers from 0"),
        ([[1]], {"decoder_start_token_id": 1}, "=1 was given, but this model has no encoder"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ([[1]], {"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens=5 is more than max_new_tokens=4"),
        ([[1]], {"max_tokens": 4}, "unknown option 'max_tokens'; did you mean 'max_new_tokens'"),
        ([[1]], {"do_sample": True}, "do_sample is implied: a temperature above 0 samples"),
        ([[1]], {"top_k": 4}, "top_k=4 has no effect at temperature=0"),
        ([[1]], {"num_return_sequences": 2}, "2 greedy continuations would be equal: give a temperature"),
        ([[1]], {"length_penalty": 0.6}, "length_penalty=0.6 has no effect without beams"),
        ([[1]], {"early_stopping": True}, "early_stopping=True has no effect without beams"),
        ([[1]], {"num_beams": 2, "temperature": 0.5}, "temperature=0.5 does not go with num_beams=2"),
        ([[1]], {"num_beams": 2, "repetition_penalty": 1.5}, "penalty=1.5 does not go with num_beams"),
        ([[1]], {"num_beams": 2, "stop_strings": ["a"]}, r"stop_strings=\('a',\) does not go with"),
        ([[1]], {"num_beams": 2, "prompt_lookup_num_tokens": 2}, "num_tokens=2 does not go with num_beams"),
        ([[1]], {"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams"),
        ([[1]], {"num_beams": 2, "early_stopping": "always"}, "='always' must be True, False or 'never'"),
        ([[1]], {"num_beams": 2, "beam_rule": "gnm"}, "unknown beam_rule 'gnm'; did you mean 'gnmt'"),
        ([[1]], {"cache_dtype": torch.int32}, "cache dtype torch.int32 is not accepted"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(prompts: Any, values: dict[str, Any], message: str) -> None:
    engine = Counting(decoder())
    with pytest.raises(ValueError, match=message):
        generate(engine, prompts, **values)
    assert engine.prefilled == 0


def test_beams_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="num_beams=2 cannot be streamed"):
        stream(decoder(), [[1]], num_beams=2)
    with pytest.raises(ValueError, match="num_beams=2 cannot be streamed"):
        generate(decoder(), [[1]], num_beams=2, callback=print)


def test_an_encoder_decoder_model_needs_its_start_token_and_a_source_that_fits() -> None:
    with pytest.raises(
        ValueError, match="decoder_start_token_id=None: an encoder-decoder model needs the token"
    ):
        generate(seq2seq(), [[1]])
    model = seq2seq()
    model.encoder.embedding.position.max_context = 3
    with pytest.raises(ValueError, match="a source of 4 tokens is longer than the encoder's 3 positions"):
        generate(model, [[1, 2, 3, 4]], decoder_start_token_id=1)


def test_options_are_values_that_single_ones_go_over() -> None:
    options = Options(max_new_tokens=7, eos_token_id=END)
    result = generate(decoder(), [[1]], options, max_new_tokens=3, eos_token_id=())
    assert len(result[0].tokens) == 3
    assert options.max_new_tokens == 7
    assert config().vocab == VOCAB
