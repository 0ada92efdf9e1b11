"""Tiny float32 models on both engines, and how far logits may differ between them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from writehead.config import ModelConfig
from writehead.core.state import State
from writehead.decode.engine import TorchEngine
from writehead.model.decoder import Decoder
from writehead.native.engine import NativeEngine
from writehead.native.library import library
from writehead.native.weights import PackedModel, pack_model

sys.path.append(str(Path(__file__).parents[1] / "decode"))
from tiny_models import CAUSAL, PROMPTS, config, decoder, spread

__all__ = [
    "CAUSAL",
    "FLIPS",
    "PROMPTS",
    "ROUNDING",
    "built",
    "close",
    "decoder",
    "native",
    "padded",
    "play",
    "single",
]
FLIPS = 5e-3  # where a key or value may be stored as the next number of fewer bits
ROUNDING = 3e-5  # of the largest logit: the tiny models enlarge a rounding some hundredfold, a defect ten thousandfold


def native(model: Decoder | PackedModel, threads: int = 2, format: str = "float32") -> NativeEngine:
    """The native engine of a model."""
    if library()[0] is None:
        pytest.skip(f"no native engine here: {library()[1]}")
    return NativeEngine(
        model if isinstance(model, PackedModel) else pack_model(model, format), threads=threads
    )


def single(*given: Any, **values: Any) -> Decoder:
    """A tiny model in float32."""
    return decoder(*given, **values).float()


def built(seed: int, **values: Any) -> Decoder:
    """A tiny model in float32 whose config has these values, all of its biases and norms random."""
    given = ModelConfig.from_dict(config().to_dict() | values)
    model: Decoder = spread(Decoder(given), seed).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    T = max(map(len, rows))
    return torch.tensor([[-1] * (T - len(r)) + [*r] if left else [*r] + [-1] * (T - len(r)) for r in rows])


def close(ours: Tensor, theirs: Tensor, rounding: float = ROUNDING) -> None:
    """Are these the same logits up to float32 rounding?"""
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.1, "logits near zero would hide a difference"
    assert (ours.double() - theirs.double()).abs().max() < rounding * theirs.abs().max()


def play(
    engine: NativeEngine | TorchEngine, state: State, calls: Sequence[Tensor]
) -> tuple[list[Tensor], State]:
    """Logits after the real tokens of each call (B, T), and the state after them."""
    found = []
    for tokens in calls:
        logits, state = engine.verify(tokens, state)
        found.append(logits[tokens >= 0])
    return found, state
