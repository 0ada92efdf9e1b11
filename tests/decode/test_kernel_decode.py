"""Every way of decoding on states that sum up their past: the kernel family, alone and between other layers."""

from dataclasses import replace

import pytest
import torch
from tiny_models import END, PROMPTS, config, decoder, greedy, next_logprobs, spread

from writehead.catalog import MIXERS
from writehead.core.state import nbytes
from writehead.core.work import Call
from writehead.costs import state_bytes
from writehead.decode.generate import generate
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder

KERNELS = [name for name, row in MIXERS.items() if row.family == "kernel"]


def tokens(result):
    return [generation.tokens for generation in result]


def mixed():
    """A gated layer, one with a ring, one with a running maximum."""
    names = ("rfa_gate", "local_mqa", "performer")
    layers = tuple({"name": name, "heads": 4, "kv_heads": 2} for name in names)
    return spread(Decoder(replace(config(), depth=3, mixer=layers)), 2)


@pytest.mark.parametrize("mixer", KERNELS)
def test_greedy_texts_of_a_ragged_batch_equal_their_definition(mixer):
    model = decoder(mixer)
    result = generate(model, PROMPTS, max_new_tokens=10, eos_token_id=END)
    assert tokens(result) == [greedy(model, prompt, 10, eos=END) for prompt in PROMPTS]


@pytest.mark.parametrize("mixer", KERNELS)
def test_rescoring_gives_the_log_probabilities_of_generating(mixer):
    model = decoder(mixer)
    for generation in generate(model, PROMPTS, max_new_tokens=8, temperature=1.5, seed=3):
        prompt = PROMPTS[generation.prompt]
        own = next_logprobs(model, prompt + generation.tokens)[len(prompt) - 1 : -1]
        expected = own.gather(1, torch.tensor(generation.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(generation.logprobs).double(), expected, atol=1e-6, rtol=0)


def test_beams_samples_and_speculation_work_on_mixed_layers():
    model = mixed()
    plain = generate(model, PROMPTS, max_new_tokens=16)
    assert tokens(plain) == [greedy(model, prompt, 16) for prompt in PROMPTS]
    drafted = generate(model, PROMPTS, max_new_tokens=16, prompt_lookup_num_tokens=4)
    assert tokens(drafted) == tokens(plain)
    assert drafted.timings.drafted_tokens > 0
    beams = generate(model, PROMPTS, max_new_tokens=8, num_beams=3, num_return_sequences=3)
    for generation in beams:
        prompt = PROMPTS[generation.prompt]
        own = next_logprobs(model, prompt + generation.tokens)[len(prompt) - 1 : -1]
        expected = own.gather(1, torch.tensor(generation.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(generation.logprobs).double(), expected, atol=1e-6, rtol=0)


def test_the_bytes_of_a_mixed_state_are_those_predicted():
    model, batch = mixed(), torch.randint(0, 10, (2, 12))
    with torch.no_grad():
        _, state = model.step(batch, model.init_state(2))
    assert nbytes(state) == state_bytes(model, Call(batch=2, tokens=12, itemsize=8))


@pytest.mark.parametrize("mixer", [name for name in KERNELS if name != "rfa_gate"])
def test_encoders_of_the_family_read_both_ways(mixer):
    model = spread(Encoder(config(mixer, kind="encoder")), 2)
    row = torch.tensor([[1, 2, 3, 4, 5]])
    other = torch.tensor([[1, 2, 3, 4, 6]])
    with torch.no_grad():
        assert float((model(row)[0][:, 0] - model(other)[0][:, 0]).abs().max()) > 1e-6


def test_a_gated_encoder_is_refused():
    with pytest.raises(
        ValueError, match="mixer 'rfa_gate' has no bidirectional form; it serves decoders only"
    ):
        Encoder(config("rfa_gate", kind="encoder"))
