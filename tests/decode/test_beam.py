"""Beam search: equal to its definition without a cache, to exhaustive search, and to transformers."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, END, PROMPTS, Counting, Letters, decoder, next_logprobs, seq2seq, summing

from writehead.convert.load import load
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate
from writehead.decode.options import Options
from writehead.mixers.cross import Memory

Beam = tuple[float, list[int]]


def search(model: Any, prompt: Sequence[int], options: Options, source: Sequence[int] = ()) -> list[Beam]:
    """The definition in plain Python: every step scores every text anew, without state."""

    def lp(length: int) -> float:
        base = length if options.beam_rule == "power" else (5 + length) / 6
        return float(base**options.length_penalty)

    B, limit, eos = options.num_beams, options.max_new_tokens, options.eos
    alive: list[Beam] = [(0.0, [])]
    ended: list[Beam] = []
    for length in range(1, limit + 1):
        grown: list[Beam] = []
        for total, text in alive:
            logprobs = next_logprobs(model, [*prompt, *text], source)[-1].tolist()
            grown += [(total + logprob, [*text, token]) for token, logprob in enumerate(logprobs)]
        if length <= options.min_new_tokens:
            grown = [beam for beam in grown if beam[1][-1] not in eos]
        best = sorted(grown, key=lambda b: -b[0])[: B * max(2, 1 + len(eos))]
        alive = [b for b in best if b[1][-1] not in eos][:B]
        ends = [(total, text) for total, text in best if text[-1] in eos]
        if options.beam_rule == "power":
            ends = [(total, text) for total, text in best[:B] if text[-1] in eos or length == limit]
        ended += [(total / lp(length), text) for total, text in ends]
        ended = sorted(ended, key=lambda b: -b[0])[:B]
        if not alive:
            break
        if len(ended) == B:
            if options.early_stopping is True:
                break
            if options.early_stopping is False and alive[0][0] / lp(length) <= ended[-1][0]:
                break
    cut = [(total / lp(length), text) for total, text in alive] if options.beam_rule == "gnmt" else []
    return [*ended, *cut][: options.num_return_sequences]


def ended(text: list[int], eos: list[int]) -> list[int]:
    """A text up to its first end token."""
    return next((text[: n + 1] for n, token in enumerate(text) if token in eos), text)


def assert_equal(model: Any, options: Options, sources: bool = False) -> None:
    """Our search of all prompts at once against the definition, prompt by prompt."""
    result = generate(model, PROMPTS, options)
    expected = [
        (n, score, text)
        for n, prompt in enumerate(PROMPTS)
        for score, text in search(model, [1] if sources else prompt, options, prompt if sources else ())
    ]
    assert [(g.prompt, g.tokens) for g in result] == [(n, text) for n, _, text in expected]
    assert [g.score for g in result] == pytest.approx([score for _, score, _ in expected], abs=1e-9)


@pytest.mark.parametrize("mixer", CAUSAL)
def test_beams_with_a_cache_equal_beams_without(mixer: str) -> None:
    options = Options(num_beams=3, num_return_sequences=2, max_new_tokens=9, eos_token_id=END)
    assert_equal(decoder(mixer), options)


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize(("rule", "alpha"), [("gnmt", 0.6), ("power", 1.0), ("power", 0.0), ("power", -0.7)])
def test_every_penalty_and_stopping_rule_equals_its_definition(
    rule: str, alpha: float, early: bool | str
) -> None:
    options = Options(
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=8,
        eos_token_id=[END, 3],
        beam_rule=rule,
        length_penalty=alpha,
        early_stopping=early,
    )  # the definition has no rule for "never": it looks at every length
    assert_equal(decoder(), options)


def test_beams_of_an_encoder_decoder_model_equal_their_definition_and_share_a_memory_row() -> None:
    engine = Counting(seq2seq())
    options = Options(
        num_beams=4, num_return_sequences=2, max_new_tokens=7, eos_token_id=END, decoder_start_token_id=1
    )
    assert_equal(engine.model, options, sources=True)
    generate(engine, PROMPTS, options)
    memories = [memory for state in engine.states for _, memory in state.layers]
    assert all(isinstance(memory, Memory) for memory in memories)
    assert all(len(memory.k) == len(set(memory.row.tolist())) for memory in memories)
    assert max(len(memory.k) for memory in memories) == len(PROMPTS)
    assert max(len(memory.row) for memory in memories) == 4 * len(PROMPTS)


def test_beams_work_on_states_that_sum_up_their_past() -> None:
    assert_equal(summing(), Options(num_beams=3, max_new_tokens=8, eos_token_id=END))


def test_no_beam_ends_before_its_least_length() -> None:
    options = Options(num_beams=3, max_new_tokens=8, min_new_tokens=4, eos_token_id=[END, 3])
    assert_equal(decoder(), options)


@pytest.mark.parametrize("rule", ["power", "gnmt"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_texts(alpha: float, rule: str) -> None:
    model, prompt, V, limit, end = decoder(vocab=4), [1, 2], 4, 4, 3
    options = Options(
        num_beams=V**limit,
        num_return_sequences=60,
        max_new_tokens=limit,
        eos_token_id=end,
        length_penalty=alpha,
        beam_rule=rule,
    )
    scored = []
    going_on = [token for token in range(V) if token != end]
    for n in range(limit):
        for start in itertools.product(going_on, repeat=n):
            for text in [[*start, end], *([[*start, t] for t in going_on] if n == limit - 1 else [])]:
                logprobs = next_logprobs(model, prompt + text)[len(prompt) - 1 : -1]
                total = sum(float(logprobs[t, token]) for t, token in enumerate(text))
                length = len(text) if rule == "power" else (5 + len(text)) / 6
                cut_off = rule == "gnmt" and text[-1] != end
                scored.append((cut_off, -total / length**alpha, text))
    best = sorted(scored)[:60]
    result = generate(model, [prompt], options)
    assert [g.tokens for g in result] == [text for _, _, text in best]
    assert [g.score for g in result] == pytest.approx([-score for _, score, _ in best], abs=1e-9)


def test_a_search_returns_what_there_is_when_texts_run_out() -> None:
    options = Options(num_beams=8, num_return_sequences=8, max_new_tokens=2, eos_token_id=(0, 1))
    result = generate(decoder(vocab=3), [[1]], options)
    assert sorted(g.tokens for g in result) == [[0], [1], [2, 0], [2, 1], [2, 2]]


def test_one_beam_is_greedy() -> None:
    model = decoder()
    plain = generate(model, PROMPTS, max_new_tokens=12, eos_token_id=END)
    one = generate(model, PROMPTS, max_new_tokens=12, eos_token_id=END, num_beams=1)
    assert [g.tokens for g in one] == [g.tokens for g in plain]
    greedy = generate(model, PROMPTS, max_new_tokens=12)
    for g, prompt in zip(greedy, PROMPTS, strict=True):
        ((_, text),) = search(model, prompt, Options(max_new_tokens=12))
        assert g.tokens == text


def test_scores_and_log_probabilities_are_those_of_rescoring() -> None:
    model = decoder("local_mqa")
    options = Options(
        num_beams=4, num_return_sequences=4, max_new_tokens=9, eos_token_id=END, length_penalty=0.6
    )
    for g in generate(model, PROMPTS, options):
        prompt = PROMPTS[g.prompt]
        own = next_logprobs(model, prompt + g.tokens)[len(prompt) - 1 : -1]
        expected = [float(own[t, token]) for t, token in enumerate(g.tokens)]
        assert g.logprobs == pytest.approx(expected, abs=1e-9)
        assert g.score == pytest.approx(sum(expected) / len(expected) ** 0.6, abs=1e-9)
        assert g.finish_reason == ("eos" if g.tokens[-1] == END else "length")


def test_a_search_that_is_over_leaves_the_batch() -> None:
    engine = Counting(decoder())
    options = Options(num_beams=3, max_new_tokens=20, eos_token_id=END, early_stopping=True)
    generate(engine, PROMPTS, options)
    assert engine.rows[0] == 3 * len(PROMPTS)
    assert engine.rows == sorted(engine.rows, reverse=True)
    assert engine.rows[-1] < engine.rows[0]
    assert engine.prefilled == sum(map(len, PROMPTS))


def test_beams_have_texts_and_timings() -> None:
    result = generate(
        decoder(), PROMPTS, num_beams=3, max_new_tokens=8, tokenizer=Letters(), eos_token_id=END
    )
    for g in result:
        ids = [token for token in g.tokens if token not in (0, 1, END)]
        assert g.text == b"".join(map(Letters().token_bytes, ids)).decode(errors="replace")
    assert 0 < result.timings.decode_steps <= 7
    assert 3 * result.timings.decode_steps <= result.timings.decode_tokens <= 12 * result.timings.decode_steps
    assert result.timings.state_bytes > 0


def test_logits_that_are_no_numbers_stop_a_search() -> None:
    model = decoder(tie_embeddings=False)
    with torch.no_grad():
        model.embedding.table[7] = math.nan
    with pytest.raises(ValueError, match="row 2: the model produced NaN"):
        generate(model, [[1], [7]], max_new_tokens=3, num_beams=2)


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize(("family", "eos"), [("llama", [5]), ("gpt2", [5, 7]), ("gpt2", [])])
def test_beams_are_those_of_transformers(
    family: str, eos: list[int], early: bool | str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(3)
    if family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.6, **shape,
        )  # fmt: skip
        theirs = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.4, **shape)
        theirs = transformers.GPT2LMHeadModel(config)
    theirs = theirs.double().eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype=torch.float64).model
    prompts = torch.randint(2, 40, (3, 5))
    options: dict[str, Any] = {
        "num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 24, "length_penalty": 0.8,
        "early_stopping": early,
    }  # fmt: skip
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, output_scores=True,
        return_dict_in_generate=True, pad_token_id=0, eos_token_id=eos or None, **options,
    )  # fmt: skip
    result = generate(TorchEngine(ours), prompts.tolist(), eos_token_id=eos, **options)  # type: ignore[arg-type]
    assert [g.tokens for g in result] == [ended(row[5:], eos) for row in expected.sequences.tolist()]
    assert {g.finish_reason for g in result} >= ({"eos"} if eos else {"length"})
    assert [g.score for g in result] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-6)
