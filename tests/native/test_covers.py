"""What the native engine covers: every decoder family that we load, and for the rest a reason."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_native import close, config, native, play

from writehead.config import ModelConfig
from writehead.convert.load import load
from writehead.core.pattern import And, Causal, Full, Leading, Or, Pattern, PerHead, Window
from writehead.core.slots import Store
from writehead.decode.engine import TorchEngine
from writehead.native.covers import NotCoveredError, why_not, window_and_lead
from writehead.native.engine import NativeEngine
from writehead.native.weights import PackedModel

sys.path.append(str(Path(__file__).parents[1] / "convert"))
from their_models import DECODERS, make


@pytest.mark.parametrize("case", DECODERS)
def test_every_decoder_family_runs_with_the_logits_of_pytorch(case: str, tmp_path: Path) -> None:
    make(case).save_pretrained(tmp_path)
    model = load(tmp_path).model
    assert why_not(model.config) is None
    ours, theirs = native(model), TorchEngine(model)
    text = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    calls = [text[:, 11:12], text[:, 12:13], text[:, 13:]]
    found, _ = play(ours, ours.start(text[:, :11], Store())[1], calls)
    right, _ = play(theirs, theirs.start(text[:, :11], Store())[1], calls)
    for a, b in zip(found, right, strict=True):
        close(a, b)


def changed(**values: Any) -> ModelConfig:
    return ModelConfig.from_dict(config().to_dict() | values)


REASONS = {
    "no t5 positions": changed(position={"name": "t5"}),
    "no infused positions": changed(position={"name": "infused"}),
    "normalises before each part of a layer": changed(stack={"name": "residual", "order": "post"}),
    r"layer 1 reads PerHead": changed(
        mixer=(
            {"name": "mha", "heads": 2},
            {
                "name": "mha",
                "heads": 2,
                "pattern": {
                    "name": "per_head",
                    "patterns": [{"name": "causal"}, {"name": "window", "window": 3}],
                },
            },
        )
    ),
    "no embed_norm_last; this model has True": changed(embed_norm=True, embed_norm_last=True),
    "no token_types; this model has 2": changed(token_types=2),
    "no head_transform; this model has 'relu'": changed(head_transform="relu"),
    "runs decoders; this model is of kind 'encoder'": config("bidirectional", "sinusoidal", kind="encoder"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_model_that_is_not_covered_gets_a_reason(reason: str) -> None:
    found = why_not(REASONS[reason])
    assert found is not None
    with pytest.raises(NotCoveredError, match=reason):
        NativeEngine(PackedModel(REASONS[reason], "float32", {}, {}))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Causal(), (0, 0)),
        (Window(7), (7, 0)),
        (Window(7, 1), None),
        (Causal() & Window(7, 3), (7, 0)),
        (Full() & Causal(), (0, 0)),
        (Causal() & (Window(5) | Leading(2)), (5, 2)),
        ((Leading(2) | Window(5, 4)) & Causal(), (5, 2)),
        (Causal() & (Leading(2) | Leading(5)), None),
        (Leading(3) & Window(4), None),
        (Full(), None),
        (PerHead((Causal(), Window(2))), None),
    ],
    ids=str,
)
def test_a_pattern_is_a_window_and_first_keys_or_not_covered(
    pattern: Pattern, expected: tuple[int, int] | None
) -> None:
    assert window_and_lead(pattern) == expected
    if expected is not None:
        window, lead = expected
        q, k = torch.arange(40)[:, None], torch.arange(40)
        same = (k <= q) & ((q - k < window) | (k < lead) if window else torch.tensor(True))
        assert torch.equal(pattern.allows(q, k), same)


def test_and_or_take_their_sides_in_any_order() -> None:
    sinks = Or(Leading(4), Window(9))
    assert window_and_lead(And(sinks, Causal())) == window_and_lead(And(Causal(), sinks)) == (9, 4)
