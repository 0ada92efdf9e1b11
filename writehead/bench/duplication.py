"""The Reformer paper's duplication task: 0 w 0 w, learned by one layer, judged with other rounds of hashing.

The second w can only be had by attending |w| + 1 places back; a hash that separates those places loses it.
Full attention is the same layer with one bucket and a window of the whole sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.mixers.reformer import LSH
from writehead.model.decoder import Decoder

FULL = 0  # stands for full attention where a number of rounds is asked for
ROUNDS = (FULL, 8, 4, 2, 1)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What is learned, and how.

    Attributes:
        word: symbols of w; the sequence has 2 (word + 1) tokens.
        symbols: how many there are, beside the 0.
        dim, heads: of the one layer.
        window: keys of its bucket that a token reads in a round; there are 2 T / window buckets.
        rows, steps, lr: of training with Adam; the rate rises over a tenth of the steps and falls to 0.
        judged: sequences of the evaluation.
        seed: of weights, hashes and sequences.
    """

    word: int = 15
    symbols: int = 16
    dim: int = 64
    heads: int = 4
    window: int = 8
    rows: int = 32
    steps: int = 1500
    lr: float = 5e-3
    judged: int = 256
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * (self.word + 1)

    def model(self) -> Decoder:
        """One reversible layer with hashes for as many rounds as there may be."""
        mixer = {"name": "reformer", "heads": self.heads, "rounds": max(ROUNDS), "window": self.window}
        mixer["buckets"] = 2 * max(1, self.length // self.window)
        config = ModelConfig(
            vocab=self.symbols + 1,
            dim=self.dim,
            depth=1,
            mixer=mixer,
            feedforward={"name": "dense", "hidden": self.dim},
            position={"name": "learned", "max_context": self.length},
            stack={"name": "reversible"},
            tie_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Decoder(config)

    def draw(self, rows: int, dice: torch.Generator) -> Tensor:
        """Sequences 0 w 0 w, (rows, T)."""
        w = torch.randint(1, self.symbols + 1, (rows, self.word), generator=dice)
        zero = torch.zeros(rows, 1, dtype=torch.int64)
        return torch.cat([zero, w, zero, w], 1)


def attend(model: Decoder, rounds: int, task: Task) -> None:
    """Let the layer hash `rounds` times, or read everything (`FULL`)."""
    mixer = next(iter(model.blocks)).mixer
    assert isinstance(mixer, LSH)
    if rounds == FULL:
        mixer.hashes.rotations.zero_()  # all products are 0, so all tokens have bucket 0
    mixer.rounds = mixer.eval_rounds = rounds or 1
    mixer.window = task.window if rounds else task.length


def logits(model: Decoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the model says about the second w, and what it is."""
    half = rows.shape[1] // 2
    x, _ = model.whole(rows[:, :-1])
    return model.logits(x[:, half:]), rows[:, half + 1 :]


def learn(task: Task, rounds: int, say: Say = lambda text: None) -> Decoder:
    """Train the layer with so many rounds, or with full attention."""
    model, dice = task.model(), torch.Generator().manual_seed(task.seed + 1)
    attend(model, rounds, task)
    optimizer = torch.optim.Adam(model.parameters(), task.lr)
    warm = max(1, task.steps // 10)
    for step in range(task.steps):
        rate = min(1.0, (step + 1) / warm) * (1 - step / task.steps)
        optimizer.param_groups[0]["lr"] = task.lr * rate
        said, wanted = logits(model, task.draw(task.rows, dice))
        loss = F.cross_entropy(said.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 250 == 0:
            right = (said.argmax(-1) == wanted).float().mean().item()
            say(f"{name_of(rounds)}: step {step + 1}, loss {loss.item():.3f}, accuracy {right:.3f}")
    return model


@torch.no_grad()
def judge(model: Decoder, task: Task, rounds: int) -> float:
    """Share of the second w that a copy of the model, attending in another way, gets right."""
    other = task.model()
    other.load_state_dict(model.state_dict())
    mixer, fresh = next(iter(other.blocks)).mixer, next(iter(task.model().blocks)).mixer
    mixer.hashes.load_state_dict(fresh.hashes.state_dict())  # full attention has none to hand on
    attend(other, rounds, task)
    dice = torch.Generator().manual_seed(task.seed + 2)
    said, wanted = logits(other.eval(), task.draw(task.judged, dice))
    return (said.argmax(-1) == wanted).float().mean().item()


def table(
    task: Task, train: Sequence[int] = ROUNDS, judged: Sequence[int] = ROUNDS, say: Say = print
) -> dict[str, dict[str, float]]:
    """Accuracy by how a model was trained, and by how it attends when it is evaluated."""
    found = {}
    for rounds in train:
        model = learn(task, rounds, say)
        found[name_of(rounds)] = {name_of(other): judge(model, task, other) for other in judged}
        say(f"{name_of(rounds)}: {found[name_of(rounds)]}")
    return found


def name_of(rounds: int) -> str:
    """ "full" or "LSH-4"."""
    return f"LSH-{rounds}" if rounds else "full"


def markdown(found: dict[str, dict[str, float]]) -> str:
    """The table for the docs: a row for each training."""
    columns = list(next(iter(found.values())))
    rows = [f"| trained with | {' | '.join(f'judged with {name}' for name in columns)} |"]
    rows.append("|---" * (len(columns) + 1) + "|")
    rows += [f"| {name} | {' | '.join(f'{own[c]:.1%}' for c in columns)} |" for name, own in found.items()]
    return "\n".join(rows)
