"""How well random features estimate softmax attention: error against the number of features."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writehead.bench.plots import INK, _pyplot, _save
from writehead.ops.features import directions


def estimate(counts: Sequence[int] = (8, 16, 32, 64, 128, 256, 512), seeds: int = 40) -> dict[str, Any]:
    """Error of attention estimated by random features, against softmax attention.

    Values are normal, queries and keys normal of standard deviation 1/2 (T = 32, D = 16); the error is
    |y' - y|^2 / |y|^2, averaged over seeds.

    Args:
        counts: features M; waves and hyperbolic ones make two of each direction.
        seeds: draws of inputs and directions.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in ("positive", "hyperbolic", "waves"):
        for draw in ("independent", "orthogonal"):
            line = found.setdefault(f"{kind}, {draw}", {})
            for M in counts:
                line[str(M)] = math.fsum(_error(kind, draw, M, seed) for seed in range(seeds)) / seeds
    return found


def _error(kind: str, draw: str, M: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 32, 16, generator=generator, dtype=torch.float64).unbind()
    q, k = q / 4, k / 4  # x' = D^-1/4 x for x half as large
    right = torch.softmax(q @ k.T, -1) @ v
    W = directions(M if kind == "positive" else M // 2, 16, draw, generator)

    def features(x: Tensor) -> Tensor:
        p, half = x @ W.T, x.square().sum(-1, keepdim=True) / 2
        if kind == "waves":
            return torch.cat([p.sin(), p.cos()], -1) * half.exp()
        return torch.exp((torch.cat([p, -p], -1) if kind == "hyperbolic" else p) - half)

    weights = features(q) @ features(k).T
    y = weights @ v / weights.sum(-1, keepdim=True)
    return float((y - right).square().sum() / right.square().sum())


def estimate_plot(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Error against features, both logarithmic; dashed: independent draws."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for i, (name, line) in enumerate(found.items()):
        dash = "--" if name.endswith("independent") else "-"
        axis.loglog([int(m) for m in line], list(line.values()), dash, color=INK[i // 2], label=name)
    axis.set_xlabel("features M")
    axis.set_ylabel("error of attention, |y' - y|² / |y|²")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)
