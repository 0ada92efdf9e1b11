"""Small float64 models whose texts wander, and an engine that counts what it is asked to compute."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from writehead.catalog import MIXERS, load
from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import State
from writehead.decode.engine import TorchEngine
from writehead.mixer import NOTHING, Aux
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq

VOCAB = 11
END = 9  # ends three of the greedy texts, at different lengths
RING = {"pattern": {"name": "window", "window": 5}}
SINKS = {
    "pattern": {
        "name": "and",
        "a": {"name": "causal"},
        "b": {"name": "or", "a": {"name": "window", "window": 4}, "b": {"name": "leading", "count": 2}},
    }
}
SMALL = {  # windows that fill within a few tokens
    "local_mha": RING,
    "local_mqa": RING,
    "sink_mqa": SINKS,
    "transformer_xl": {"segment": 3, "memory": 4},
    "sliding_xl": {"memory": 5},
    "luna": {"slots": 3},
    "long_short": {"window": 4, "chunk": 3, "rank": 2},
    "compressive": {"segment": 2, "memory": 4, "compressed": 3},
    "most_used": {"segment": 2, "memory": 4, "compressed": 3},
}
SEEDS = {"transformer_xl": 9, "sliding_xl": 9, "most_used": 9}  # whose texts do not end at once
CAUSAL = [name for name, row in MIXERS.items() if row.decodes not in ("encode", "O(1)")]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [2, 3]]


def spread(model: nn.Module, seed: int) -> Any:
    """The same model in float64 with weights so large that a next token depends on all before."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8, generator=generator)
    return model


def config(mixer: str = "gqa", position: str = "rotary", **values: Any) -> ModelConfig:
    """A decoder of two layers."""
    takes = inspect.signature(load(MIXERS[mixer])).parameters
    spec = {"name": mixer, "heads": 4, **SMALL.get(mixer, {})}
    brings = "position" not in takes or (mixer.startswith("sinkhorn") and position in ("alibi", "t5"))
    if brings and position in ("infused", "rotary", "alibi", "t5"):
        position = "none"  # the mixer brings its own, or takes no score bias
    scheme = {"name": position} | ({"max_context": 64} if position == "learned" else {})
    given = {"vocab": VOCAB, "dim": 16, "depth": 2, "mixer": spec, "position": scheme} | values
    return ModelConfig(feedforward={"name": "dense", "hidden": 24}, **given)


def decoder(mixer: str = "gqa", position: str = "rotary", seed: int | None = None, **values: Any) -> Decoder:
    return spread(Decoder(config(mixer, position, **values)), SEEDS.get(mixer, 2) if seed is None else seed)


def seq2seq(seed: int = 2) -> Seq2Seq:
    """An encoder-decoder with grouped cross-attention."""
    encoder = config("bidirectional", "sinusoidal", kind="encoder")
    cross = {"name": "cross", "heads": 4, "kv_heads": 2}
    return spread(Seq2Seq(config("mqa", "sinusoidal", kind="seq2seq", cross=cross, encoder=encoder)), seed)


class Summing(nn.Module):
    """A mixer whose state is a decaying sum over its past, which nothing can take back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int, like: Tensor, store: Any = None) -> Tensor:
        return like.new_zeros(batch, self.out.in_features)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Any = None) -> int:
        return batch * self.out.in_features * itemsize

    def forward(self, x: Tensor, pos: Positions, state: Tensor | None = None) -> tuple[Tensor, Tensor, Aux]:
        sums, state = [], self.init_state(len(x), x) if state is None else state
        for t in range(x.shape[1]):
            state = torch.where(pos.valid[:, t, None], 0.7 * state + x[:, t], state)
            sums.append(state)
        return self.out(torch.stack(sums, 1)), state, NOTHING


def summing() -> Any:
    """A decoder with one ordinary layer and one whose state cannot rewind."""
    model = decoder("local_mqa")
    torch.manual_seed(0)
    model.stack.blocks[1].mixer = Summing(16).double().eval()
    return model


def next_logprobs(model: Decoder | Seq2Seq, tokens: Sequence[int], source: Sequence[int] = ()) -> Tensor:
    """Log-probabilities (T, V) after each token of a text, in one pass and from the empty past."""
    row = torch.tensor([list(tokens)])
    with torch.inference_mode():
        logits, _ = model(torch.tensor([list(source)]), row) if source else model(row)
    return logits[0].log_softmax(-1)


def greedy(model: Decoder, prompt: Sequence[int], count: int, eos: int = -1) -> list[int]:
    """The continuation by definition: each token from the whole text anew."""
    text = list(prompt)
    while len(text) < len(prompt) + count and (len(text) == len(prompt) or text[-1] != eos):
        text.append(int(next_logprobs(model, text)[-1].argmax()))
    return text[len(prompt) :]


class Counting(TorchEngine):
    """Counts calls and real tokens, and keeps the states that it gave."""

    def __init__(self, model: Decoder | Seq2Seq, **values: Any) -> None:
        super().__init__(model, **values)
        self.prefilled = self.stepped = self.calls = 0
        self.rows: list[int] = []
        self.states: list[State] = []

    def start(self, tokens: Tensor, store: Store, source: Tensor | None = None) -> tuple[Tensor, State]:
        self.prefilled += int((tokens >= 0).sum())
        return self._keep(super().start(tokens, store, source))

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        self._count(tokens)
        return self._keep(super().step(tokens, state))

    def verify(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        self._count(tokens)
        return self._keep(super().verify(tokens, state))

    def _count(self, tokens: Tensor) -> None:
        self.calls += 1
        self.rows.append(len(tokens))
        self.stepped += int((tokens >= 0).sum())

    def _keep(self, result: tuple[Tensor, State]) -> tuple[Tensor, State]:
        self.states.append(result[1])
        return result


class Letters:
    """A tokenizer: token 0 ends a text, 1 begins one, the others are letters or pieces of characters."""

    bos: int | None = 1
    eos = frozenset({0})
    strips_space = False
    pieces = (b"", b"", b"a", b"b", b"ab", b" c", b"\xe2\x82", b"\xac", b"d", b"e\n", b"\xf0")

    def is_special(self, number: int) -> bool:
        return number < 2

    def token_bytes(self, number: int) -> bytes:
        return b"<special>" if number < 2 else self.pieces[number]
