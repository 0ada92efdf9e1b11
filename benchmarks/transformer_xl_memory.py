"""Does memory help? Transformer-XL with and without it, and a Compressive Transformer, on tinyshakespeare.

    python benchmarks/transformer_xl_memory.py DATA/tinyshakespeare.txt.gz --out benchmarks/results

All models have the same layers, data order, seed and number of steps; the state is carried from segment to
segment and its gradient cut. Bits per character on held-out text, also with a longer memory than in training.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from writehead.config import ModelConfig
from writehead.core.state import detach
from writehead.model.decoder import Decoder

SEGMENT, ROWS, DIM, DEPTH, HEADS = 8, 32, 64, 2, 4


def config(name: str, **options: int) -> ModelConfig:
    mixer = {"name": name, "heads": HEADS, "segment": SEGMENT, **options}
    return ModelConfig(
        vocab=65, dim=DIM, depth=DEPTH, mixer=mixer, feedforward={"name": "dense", "hidden": 4 * DIM},
        position={"name": "none"},
    )  # fmt: skip


def segments(text: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of neighbouring text, SEGMENT tokens at a time, with the tokens that follow."""
    length = (len(text) - 1) // rows // SEGMENT * SEGMENT
    inputs, targets = (text[i : i + rows * length].view(rows, length) for i in (0, 1))
    yield from zip(inputs.split(SEGMENT, 1), targets.split(SEGMENT, 1), strict=True)


def train(model: Decoder, text: Tensor, steps: int, peak: float = 3e-3) -> float:
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
    """Bits per character with the state carried through all of the text."""
    state, total, count = model.init_state(ROWS), 0.0, 0
    for tokens, targets in segments(text, ROWS):
        logits, state = model.step(tokens, state)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=40000, help="characters to evaluate on")
    given = parser.parse_args()
    torch.set_num_threads(1)
    raw = gzip.decompress(given.data.read_bytes()).decode()
    letters = {c: i for i, c in enumerate(sorted(set(raw)))}
    text = torch.tensor([letters[c] for c in raw])
    border = len(text) * 9 // 10
    cases = {
        "no memory": config("transformer_xl", memory=0),
        "memory 24": config("transformer_xl", memory=24),
        "memory 24, compressed 8": config("compressive", memory=24, compressed=8, ratio=4),
    }
    longer = {"memory 24": {"memory 64": config("transformer_xl", memory=64)}}
    found: list[dict[str, object]] = []
    for seed in range(given.seeds):
        for name, made in cases.items():
            torch.manual_seed(seed)
            model = Decoder(made)
            seconds = train(model, text[:border], given.steps)
            held = text[border : border + given.held_out]
            row = {"model": name, "seed": seed, "bits": bits(model.eval(), held), "cpu_seconds": seconds}
            for other, wide in longer.get(name, {}).items():
                same = Decoder(wide)
                same.load_state_dict(model.state_dict())
                row[f"bits evaluated with {other}"] = bits(same.eval(), held)
            found.append(row)
            print(json.dumps(row), flush=True)
            about = {"segment": SEGMENT, "rows": ROWS, "dim": DIM, "depth": DEPTH, "steps": given.steps}
            path = given.out / "transformer_xl_memory.json"
            path.write_text(json.dumps({"data": given.data.name, **about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
