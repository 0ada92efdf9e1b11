"""Does a memory of segments help? Transformer-XL with and without, and a Compressive Transformer, on a text.

All models have the same layers, data order, seed and number of steps; the state is carried from segment
to segment and its gradient cut. Bits a character on held-out text, with the memory of the training and
with longer ones: as they are, and with all distances beyond the training's counted as its largest
(clamped), which tells whether a longer memory fails for what it holds or for distances that nothing has
trained.
"""

import gzip
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.core.state import detach
from writehead.model.decoder import Decoder

SEGMENT, ROWS, DIM, DEPTH, HEADS = 8, 32, 64, 2, 4
ABOUT = {"segment": SEGMENT, "rows": ROWS, "dim": DIM, "depth": DEPTH, "heads": HEADS}
Options = Mapping[str, Any]
CASES: Mapping[str, Options] = {
    "no memory": {"name": "transformer_xl", "memory": 0},
    "memory 24": {"name": "transformer_xl", "memory": 24},
    "memory 64": {"name": "transformer_xl", "memory": 64},
    "memory 24, compressed 8": {"name": "compressive", "memory": 24, "compressed": 8, "ratio": 4},
}
LONGER: Mapping[str, Mapping[str, Options]] = {
    "memory 24": {
        "memory 32": {"name": "transformer_xl", "memory": 32},
        "memory 32, clamped": {"name": "transformer_xl", "memory": 32, "clamp": 31},
        "memory 64": {"name": "transformer_xl", "memory": 64},
        "memory 64, clamped": {"name": "transformer_xl", "memory": 64, "clamp": 31},
    }
}


def read(path: Path) -> Tensor:
    """A text, plain or gzip, as the numbers of its characters in order.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a text, plain or gzip")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([letters[c] for c in text])


def config(options: Options, vocab: int) -> ModelConfig:
    """A small decoder with that mixer."""
    return ModelConfig(
        vocab=vocab, dim=DIM, depth=DEPTH, mixer={"heads": HEADS, "segment": SEGMENT, **options},
        feedforward={"name": "dense", "hidden": 4 * DIM}, position={"name": "none"},
    )  # fmt: skip


def study(
    text: Tensor,
    names: Sequence[str],
    steps: int,
    seeds: int,
    held_out: int,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Train and evaluate each model with each seed.

    Args:
        text: numbers of characters; the first nine tenths are trained on.
        names: of `CASES`.
        steps: of AdamW.
        seeds: 0, 1, ...
        held_out: characters behind the border to evaluate on.
        say: told what happens.
    """
    border, vocab = len(text) * 9 // 10, int(text.max()) + 1
    held = text[border : border + held_out]
    for seed in range(seeds):
        for name in names:
            say(f"{name}, seed {seed}")
            torch.manual_seed(seed)
            model = Decoder(config(CASES[name], vocab))
            seconds = train(model, text[:border], steps)
            row = {"model": name, "seed": seed, "bits": bits(model.eval(), held), "cpu_seconds": seconds}
            for other, wide in LONGER.get(name, {}).items():
                same = Decoder(config(wide, vocab))
                same.load_state_dict(model.state_dict())
                row[f"bits evaluated with {other}"] = bits(same.eval(), held)
            yield row


def segments(text: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of neighbouring text, SEGMENT tokens at a time, with the tokens that follow."""
    length = (len(text) - 1) // rows // SEGMENT * SEGMENT
    inputs, targets = (text[i : i + rows * length].view(rows, length) for i in (0, 1))
    yield from zip(inputs.split(SEGMENT, 1), targets.split(SEGMENT, 1), strict=True)


def train(model: Decoder, text: Tensor, steps: int, peak: float = 3e-3) -> float:
    """AdamW over segments with the state carried; gives the processor's seconds."""
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01)
    began, step = time.process_time(), 0
    while step < steps:
        state = model.init_state(ROWS)
        for tokens, targets in segments(text, ROWS):
            rate = min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
            x, state, aux = model.hidden(tokens, state)
            loss = F.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten())
            optimiser.zero_grad()
            (loss + sum(aux.values())).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimiser.step()
            state, step = detach(state), step + 1
            if step == steps:
                break
    return time.process_time() - began


@torch.no_grad()
def bits(model: Decoder, text: Tensor) -> float:
    """Bits a character with the state carried through all of the text."""
    state, total, count = model.init_state(ROWS), 0.0, 0
    for tokens, targets in segments(text, ROWS):
        logits, state = model.step(tokens, state)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count / math.log(2)
