"""One training step on a million real bytes, and a thousand tokens decoded behind them.

A reversible decoder of local and LSH layers, chunked feed-forward layers and loss: what a step holds is the
two streams, their gradients and one layer at work, however many layers there are.
"""

import gzip
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writehead.bench.measure import quartiles
from writehead.bench.scaling import _highest
from writehead.config import ModelConfig
from writehead.model.decoder import Decoder, DecodeState
from writehead.ops.chunked_loss import chunked_loss
from writehead.train.config import OptimConfig
from writehead.train.optim import make_optimizer

SIDE = 1024  # positions of the inner axis
LOSS_CHUNK = 16384  # tokens whose logits are held at once
Say = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """The model.

    Attributes:
        dim, depth, hidden: width, layers, and inner width of the feed-forward layers.
        heads, head_dim: query heads, which share one key/value head, and their width.
        window: tokens that local layers read.
        buckets, bucket_window, rounds: of LSH layers, every third.
    """

    dim: int = 256
    depth: int = 6
    hidden: int = 512
    heads: int = 2
    head_dim: int = 64
    window: int = 128
    buckets: tuple[int, ...] = (64, 64)
    bucket_window: int = 32
    rounds: int = 2

    def config(self, tokens: int) -> ModelConfig:
        """The model of bytes for `tokens` positions at least."""
        heads = {"heads": self.heads, "head_dim": self.head_dim}
        local = {"name": "local_mqa", **heads, "pattern": {"name": "window", "window": self.window}}
        lsh = {"name": "reformer_mqa", **heads, "buckets": list(self.buckets)}
        lsh |= {"rounds": self.rounds, "window": self.bucket_window}
        return ModelConfig(
            vocab=256,
            dim=self.dim,
            depth=self.depth,
            mixer=(local, local, lsh),
            feedforward={"name": "chunked", "hidden": self.hidden, "chunk": 4096},
            position={"name": "axial", "shape": [-(-tokens // SIDE), SIDE]},
            stack={"name": "reversible"},
        )


@dataclass
class Result:
    """What happened.

    Attributes:
        tokens, parameters: length of the sequence, size of the model.
        loss, loss_after: nats a byte before the update, and after it (of the bytes not read singly).
        forward_s, backward_s, update_s: seconds of the step's parts.
        step_bytes: the most that the process held during the step, beyond what it held before the model.
        prefill_s: seconds to read the sequence again into a decode state, its single tokens left out.
        state_bytes: of the decode state.
        decode_bytes: the most that the process held while it read and decoded, beyond the same.
        token_s: milliseconds of a single token (quartiles), by the number of tokens before it.
        text: what was decoded, greedily, as text.
    """

    tokens: int
    parameters: int = 0
    loss: float = 0.0
    loss_after: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0
    step_bytes: int = 0
    prefill_s: float = 0.0
    state_bytes: int = 0
    decode_bytes: int = 0
    token_ms: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def read_bytes(files: Sequence[Path], count: int) -> Tensor:
    """The first `count` bytes of documents joined in the order given, plain or gzip, as (count,) ids.

    Raises:
        ValueError: the documents are shorter.
    """
    found = b""
    for path in files:
        data = path.read_bytes()
        found += gzip.decompress(data) if path.suffix == ".gz" else data
        if len(found) >= count:
            return torch.frombuffer(bytearray(found[:count]), dtype=torch.uint8).long()
    raise ValueError(f"the documents hold {len(found):,} bytes; {count:,} are needed: give more files")


def train_step(model: Decoder, ids: Tensor, result: Result, before: int, say: Say) -> None:
    """Forward, backward and AdamW's update on one row; ids (T + 1)."""
    optimizer = make_optimizer(model.named_parameters(), OptimConfig())
    model.train()
    _highest(reset=True)
    start = time.perf_counter()
    x, _ = model.whole(ids[None, :-1])
    loss = chunked_loss(model.logits, x, ids[None, 1:], chunk=LOSS_CHUNK)
    result.loss, result.forward_s = loss.item(), time.perf_counter() - start
    say(f"forward {result.forward_s:.0f} s, loss {result.loss:.4f}")
    del x
    start = time.perf_counter()
    loss.backward()
    result.backward_s = time.perf_counter() - start
    start = time.perf_counter()
    optimizer.step()
    result.update_s, result.step_bytes = time.perf_counter() - start, _highest() - before
    optimizer.zero_grad(set_to_none=True)
    say(f"backward {result.backward_s:.0f} s, update {result.update_s:.1f} s, {result.step_bytes:,} bytes")


@torch.no_grad()
def decode(
    model: Decoder, ids: Tensor, result: Result, before: int, *, new: int, piece: int, singles: int, say: Say
) -> None:
    """Read ids (T) in pieces, the last tokens of some one by one, then decode `new` tokens greedily."""
    model.eval()
    _highest(reset=True)
    state, T, at, due = model.init_state(1), len(ids), 0, piece
    x = torch.empty(0)
    nats, scored = 0.0, 0
    while at < T:
        stop = min(at + piece, T)
        probe = stop == T or stop >= due
        due = 4 * due if probe else due
        middle = max(at + 1, stop - singles) if probe else stop
        start = time.perf_counter()
        x, state, _ = model.hidden(ids[None, at:middle], state)
        wanted = ids[None, at + 1 : middle + 1]
        read = x[:, : wanted.shape[1]]
        nats += chunked_loss(model.logits, read, wanted, chunk=LOSS_CHUNK).item() * wanted.shape[1]
        scored += wanted.shape[1]
        x = x[:, -1:]
        result.prefill_s += time.perf_counter() - start
        if middle < stop:
            x, state = _one_by_one(model, ids[middle:stop], state, result, middle)
        at = stop
        say(f"{at:,} tokens read, {result.prefill_s:.0f} s")
    result.loss_after = nats / max(1, scored)
    result.state_bytes = sum(t.nbytes for t in state.tensors())
    spent, token, out = [], int(model.logits(x)[0, -1].argmax()), []
    for _ in range(new):
        start = time.perf_counter()
        x, state, _ = model.hidden(torch.tensor([[token]]), state)
        out.append(token)
        token = int(model.logits(x)[0, -1].argmax())
        spent.append(time.perf_counter() - start)
    for a in range(0, new, max(1, new // 4)):
        result.token_ms[T + a] = _ms(spent[a : a + max(1, new // 4)])
    result.text = bytes(out).decode("utf-8", errors="replace")
    result.decode_bytes = _highest() - before


def _one_by_one(
    model: Decoder, ids: Tensor, state: DecodeState, result: Result, before: int
) -> tuple[Tensor, DecodeState]:
    """Read tokens singly, as decoding does; note how long each took."""
    spent, x = [], torch.empty(0)
    for token in ids:
        start = time.perf_counter()
        x, state, _ = model.hidden(token[None, None], state)
        model.logits(x)
        spent.append(time.perf_counter() - start)
    result.token_ms[before] = _ms(spent)
    return x, state


def _ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    q1, median, q3 = quartiles(seconds)
    return 1e3 * q1, 1e3 * median, 1e3 * q3


def run(
    files: Sequence[Path],
    tokens: int = 1 << 20,
    *,
    shape: Shape = Shape(),
    new: int = 1000,
    piece: int = 1 << 18,
    singles: int = 100,
    say: Say = print,
    note: Callable[[Result], None] = lambda result: None,
) -> Result:
    """The step, then the decoding.

    Args:
        files: documents, joined.
        tokens: bytes of the sequence T.
        shape: of the model.
        new: tokens to decode.
        piece: tokens of one call while the sequence is read for decoding.
        singles: of those, how many are read one by one behind 1, 4, 16, ... pieces and the last.
        say: takes progress.
        note: takes the result after the step and at the end.

    Raises:
        ValueError: documents that are too short.
    """
    ids = read_bytes(files, tokens + 1)
    before = _highest(reset=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(shape.config(tokens + new))
    result = Result(tokens, sum(p.numel() for p in model.parameters()))
    train_step(model, ids, result, before, say)
    note(result)
    decode(model, ids[:-1], result, before, new=new, piece=piece, singles=singles, say=say)
    note(result)
    return result
