"""The PyTorch engine: prefill in pieces, ragged rows, idle rows, and the bytes that it reports."""

import pytest
import torch
from tiny_models import CAUSAL, PROMPTS, RING, config, decoder, next_logprobs, seq2seq, spread
from torch import nn

from writehead.core.slots import Store
from writehead.core.state import nbytes, tensors
from writehead.core.system import available_memory
from writehead.decode import limits
from writehead.decode.engine import TorchEngine
from writehead.decode.limits import check_memory
from writehead.mixers.cross import Memory
from writehead.model.encoder import Encoder

EXACT = {"atol": 1e-10, "rtol": 0}


def padded(rows: list[list[int]], left: bool = False) -> torch.Tensor:
    T = max(map(len, rows))
    return torch.tensor([[-1] * (T - len(r)) + r if left else r + [-1] * (T - len(r)) for r in rows])


@pytest.mark.parametrize("mixer", CAUSAL)
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_prefill_in_chunks_equals_whole_prefill_on_ragged_rows(mixer: str, chunk: int) -> None:
    model, tokens = decoder(mixer), padded(PROMPTS)
    whole, a = TorchEngine(model).start(tokens, Store(capacity=12))
    pieces, b = TorchEngine(model, prefill_chunk=chunk).start(tokens, Store(capacity=12))
    torch.testing.assert_close(pieces, whole, **EXACT)
    following = torch.tensor([3, 1, 4, 1])
    torch.testing.assert_close(
        TorchEngine(model).step(following, b)[0], TorchEngine(model).step(following, a)[0], **EXACT
    )


@pytest.mark.parametrize("left", [False, True])
def test_start_gives_the_logits_after_each_rows_last_token(left: bool) -> None:
    model = decoder()
    logits, _ = TorchEngine(model, prefill_chunk=3).start(padded(PROMPTS, left), Store())
    for row, prompt in zip(logits, PROMPTS, strict=True):
        torch.testing.assert_close(row.log_softmax(-1), next_logprobs(model, prompt)[-1], **EXACT)


def test_prefill_puts_one_token_a_row_through_the_output_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = TorchEngine(decoder(), prefill_chunk=2), []
    whole = engine._logits
    monkeypatch.setattr(engine, "_logits", lambda x: seen.append(x.shape) or whole(x))
    engine.start(padded(PROMPTS), Store())
    assert seen == [(4, 16)]


@pytest.mark.parametrize("mixer", CAUSAL)
def test_verifying_tokens_equals_stepping_through_them(mixer: str) -> None:
    engine, more = TorchEngine(decoder(mixer)), torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]])
    _, one = engine.start(padded(PROMPTS), Store(slack=2))
    _, other = engine.start(padded(PROMPTS), Store(slack=2))
    at_once, _ = engine.verify(more, one)
    for t in range(3):
        logits, other = engine.step(more[:, t], other)
        torch.testing.assert_close(at_once[:, t], logits, **EXACT)


def test_an_idle_row_remembers_nothing_of_the_call() -> None:
    engine = TorchEngine(decoder())
    _, a = engine.start(padded(PROMPTS), Store())
    _, b = engine.start(padded(PROMPTS), Store())
    _, a = engine.step(torch.tensor([-1, 2, -1, 3]), a)
    after_idling, _ = engine.step(torch.tensor([5, 5, 5, 5]), a)
    directly, _ = engine.step(torch.tensor([5, 5, 5, 5]), b)
    torch.testing.assert_close(after_idling[[0, 2]], directly[[0, 2]], **EXACT)
    assert not torch.allclose(after_idling[[1, 3]], directly[[1, 3]])


def test_an_encoder_decoder_model_starts_from_its_sources() -> None:
    model = seq2seq()
    first = torch.full((4, 1), 1)
    logits, _ = TorchEngine(model).start(first, Store(), padded(PROMPTS))
    for row, source in zip(logits, PROMPTS, strict=True):
        torch.testing.assert_close(row.log_softmax(-1), next_logprobs(model, [1], source)[-1], **EXACT)


@pytest.mark.parametrize("store", [Store(), Store(capacity=20), Store(dtype=torch.int8), Store(slack=3)])
@pytest.mark.parametrize("mixer", ["mha", "mqa", "local_mqa"])
def test_reported_state_bytes_are_those_held(mixer: str, store: Store) -> None:
    engine = TorchEngine(decoder(mixer, depth=1))
    _, state = engine.start(torch.ones(3, 9, dtype=torch.int64), store)
    assert engine.state_bytes(3, 9, store) == nbytes(state)


def test_reported_memory_bytes_are_those_that_cross_attention_holds() -> None:
    engine = TorchEngine(seq2seq())
    _, state = engine.start(torch.ones(4, 1, dtype=torch.int64), Store(), padded(PROMPTS))
    memories = [memory for _, memory in state.layers]
    assert all(isinstance(memory, Memory) for memory in memories)
    assert engine.memory_bytes(4, 7) == sum(m.k.nbytes + m.v.nbytes for m in memories)
    assert TorchEngine(decoder()).memory_bytes(4, 7) == 0


def test_a_table_that_is_only_looked_up_does_not_count_as_read() -> None:
    def total(model: nn.Module) -> int:
        return sum(p.nbytes for p in model.parameters())

    tied, untied = decoder(), decoder(tie_embeddings=False)
    learned = decoder(position="learned")
    assert TorchEngine(tied).weight_bytes() == total(tied)
    assert TorchEngine(untied).weight_bytes() == total(untied) - 11 * 16 * 8
    assert TorchEngine(learned).weight_bytes() == total(learned) - 64 * 16 * 8


def test_the_engine_knows_the_models_limits() -> None:
    engine = TorchEngine(decoder(position="learned", max_context=32))
    assert (engine.vocab, engine.positions, engine.trained_context, engine.reads_source) == (
        11,
        64,
        32,
        False,
    )
    assert TorchEngine(seq2seq()).reads_source
    assert TorchEngine(decoder()).positions is None


def test_dropout_is_off_in_an_engine() -> None:
    model = decoder(stack={"name": "residual", "dropout": 0.5}).train()
    engine = TorchEngine(model)
    first, _ = engine.start(torch.tensor([[1, 2]]), Store())
    again, _ = engine.start(torch.tensor([[1, 2]]), Store())
    torch.testing.assert_close(first, again, **EXACT)


def test_what_cannot_start_is_refused() -> None:
    engine = TorchEngine(decoder())
    with pytest.raises(ValueError, match="row 1 has no token to start from"):
        engine.start(torch.tensor([[1, 2], [-1, -1]]), Store())
    with pytest.raises(ValueError, match="this model has no encoder"):
        engine.start(torch.tensor([[1]]), Store(), torch.tensor([[1]]))
    with pytest.raises(ValueError, match="1 rows need 1 sources; got none"):
        TorchEngine(seq2seq()).start(torch.tensor([[1]]), Store())
    with pytest.raises(ValueError, match="2 rows need 2 sources; got 1"):
        TorchEngine(seq2seq()).start(torch.tensor([[1], [1]]), Store(), torch.tensor([[1]]))


def test_an_engine_wants_a_model_that_decodes() -> None:
    encoder = spread(Encoder(config("bidirectional", "sinusoidal", kind="encoder")), 0)
    with pytest.raises(ValueError, match="Encoder cannot decode; give a Decoder or a Seq2Seq"):
        TorchEngine(encoder)
    with pytest.raises(ValueError, match="prefill_chunk=0 must be at least 1 token"):
        TorchEngine(decoder(), prefill_chunk=0)


def test_memory_that_is_not_there_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 2**30)
    check_memory(2**30, "this")
    with pytest.raises(ValueError, match=r"this needs 1\.50 GiB, and 1\.00 GiB are available"):
        check_memory(3 * 2**29, "this")
    monkeypatch.setattr(limits, "available_memory", lambda: None)
    check_memory(2**60, "that")


def test_available_memory_is_some_of_this_machines() -> None:
    there = available_memory()
    assert there is not None
    assert 2**20 < there < 2**44


def test_a_rings_state_stays_as_large_as_its_window() -> None:
    engine = TorchEngine(decoder("local_mqa"))
    _, state = engine.start(torch.ones(1, 30, dtype=torch.int64), Store(capacity=100))
    assert max(t.shape[2] for t in tensors(state) if t.dim() == 4) == RING["pattern"]["window"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_a_compiled_engine_leaves_the_model_alone_and_shares_its_weights() -> None:
    model, tokens = decoder(), padded(PROMPTS)
    engine = TorchEngine(model, compile=True)
    torch.testing.assert_close(
        engine.start(tokens, Store())[0], TorchEngine(model).start(tokens, Store())[0], **EXACT
    )
    assert engine.decoder is not model
    theirs = {p.data_ptr() for p in engine.decoder.parameters()}
    assert theirs == {p.data_ptr() for p in model.parameters()}
    assert all(block.feedforward._compiled_call_impl is None for block in model.blocks)
    assert all(block.feedforward._compiled_call_impl is not None for block in engine.decoder.blocks)
