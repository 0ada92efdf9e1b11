"""Two tasks that tell what a mixer can remember: associative recall and copying, learned by one layer.

Every mixer that should learn a task, and what cannot: a window shorter than the gap, and a recurrent state
with fewer values than there are things to remember.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.catalog import MIXERS, Spec, build
from writehead.core.positions import Positions

SYMBOLS, THINGS, DIM = 8, 8, 32


class Batch(NamedTuple):
    """Sequences of 2 * THINGS tokens: in the first half to remember, in the second to answer.

    Attributes:
        place: (B, T) what a token is found by.
        symbol: (B, T) what it says; SYMBOLS where an answer is asked for.
        answer: (B, THINGS) the right symbols.
    """

    place: Tensor
    symbol: Tensor
    answer: Tensor


def recall(rows: int, generator: torch.Generator) -> Batch:
    """Pairs of a key and a symbol, keys in any order; then the keys again in another order."""
    keys, asked = (torch.rand(rows, THINGS, generator=generator).argsort(1) for _ in range(2))
    symbols = torch.randint(SYMBOLS, (rows, THINGS), generator=generator)
    of_key = torch.empty_like(symbols).scatter_(1, keys, symbols)
    silent = torch.full_like(symbols, SYMBOLS)
    return Batch(torch.cat([keys, asked], 1), torch.cat([symbols, silent], 1), of_key.gather(1, asked))


def copy(rows: int, generator: torch.Generator) -> Batch:
    """Symbols in their places; then the places once more, in order."""
    places = torch.arange(THINGS).expand(rows, -1)
    symbols = torch.randint(SYMBOLS, (rows, THINGS), generator=generator)
    return Batch(places.repeat(1, 2), torch.cat([symbols, torch.full_like(symbols, SYMBOLS)], 1), symbols)


TASKS: Mapping[str, Callable[[int, torch.Generator], Batch]] = {"recall": recall, "copy": copy}
LEARN: Mapping[str, Spec] = {
    "mha": {"name": "mha", "heads": 2},
    "mqa": {"name": "mqa", "heads": 2},
    "linear": {"name": "linear", "heads": 2},
    "linear, one write-head": {"name": "linear", "heads": 2, "kv_heads": 1},
    "performer": {"name": "performer", "heads": 2, "features": 64},
    "performer_relu": {"name": "performer_relu", "heads": 2, "features": 64},
    "rfa": {"name": "rfa", "heads": 2, "features": 32},
    "rfa_gate": {"name": "rfa_gate", "heads": 2, "features": 32},
}
CANNOT: Mapping[str, Spec] = {
    "window shorter than the gap": {
        "name": "local_mqa", "heads": 2, "pattern": {"name": "window", "window": THINGS // 2},
    },
    "state of two values": {"name": "linear", "heads": 1, "head_dim": 1},
    "performer with a state of two values": {"name": "performer", "heads": 1, "head_dim": 1, "features": 1},
}  # fmt: skip


class OneLayer(nn.Module):
    """Embedded tokens, one mixer, and the answers of the second half."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.place, self.symbol = nn.Embedding(THINGS, DIM), nn.Embedding(SYMBOLS + 1, DIM)
        self.mixer = build(MIXERS, spec, dim=DIM)
        self.answer = nn.Linear(DIM, SYMBOLS)

    def forward(self, batch: Batch) -> Tensor:
        x = self.place(batch.place) + self.symbol(batch.symbol)
        y, _, _ = self.mixer(x, Positions.range(len(x), 0, x.shape[1]))
        logits: Tensor = self.answer(y[:, THINGS:])
        return logits


def learn(spec: Spec, task: str, *, steps: int = 250, rows: int = 64, seed: int = 0) -> float:
    """Train one layer on a task and give its accuracy on sequences it has not seen.

    Args:
        spec: of the mixer.
        task: "recall" or "copy".
        steps: of Adam at 0.01, falling to 0.
        rows: sequences of a step.
        seed: of weights and sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OneLayer(spec)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        batch = TASKS[task](rows, generator)
        loss = F.cross_entropy(model(batch).flatten(0, 1), batch.answer.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch = TASKS[task](1000, generator)
    with torch.no_grad():
        return float((model(batch).argmax(-1) == batch.answer).float().mean())
