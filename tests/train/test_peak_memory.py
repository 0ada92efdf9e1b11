"""What a training step is predicted to hold: against the allocator's own events, and in itself."""

import gc
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from writehead.bench.memory import TINY, _peak
from writehead.catalog import MIXERS, Row, load
from writehead.config import ModelConfig
from writehead.laws import DIM, _shrunk
from writehead.laws import TINY as TINY_ARGUMENTS
from writehead.train import memory
from writehead.train.memory import Peak, Setting, largest, plans, predict, preparation
from writehead.train.rehearsal import Ledger, Rehearsal, Unforeseen

WAVES = {"name": "sinusoidal"}
SMALL: dict[str, Any] = {"vocab": 64, "dim": 32, "depth": 2, "mixer": {"name": "mha", "heads": 2}}


def measured(config: ModelConfig, setting: Setting) -> int:
    preparation(TINY, Setting(1, 4))(lambda phase: None)
    gc.collect()  # what goes meanwhile would count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        preparation(config, setting)(lambda phase: None)
    return _peak(watch)


@pytest.mark.slow
@pytest.mark.parametrize("plan", memory.PLANS)
def test_the_prediction_is_what_the_allocator_gives_out(plan: str) -> None:
    way = plans(ModelConfig(**SMALL), Setting(4, 256))[plan]
    assert not isinstance(way, str)
    assert predict(*way).most == pytest.approx(measured(*way), rel=0.1)


def test_a_window_cut_into_tiles_is_predicted() -> None:
    mixer = {"name": "local_mqa", "heads": 4, "pattern": {"name": "window", "window": 64}}
    way = (ModelConfig(**{**SMALL, "mixer": mixer}), Setting(1, 1024))
    assert predict(*way).most == pytest.approx(measured(*way), rel=0.1)


def test_weights_and_the_optimisers_memory_are_counted_to_the_byte() -> None:
    config = ModelConfig(**SMALL)
    values = 64 * 32 + 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 128 + 2 * 32) + 32
    fixed = predict(config, Setting(1, 8)).fixed
    steps = 4 * (2 * 6 + 2)  # AdamW's count of its steps, for each parameter
    batch = 8 * 8
    assert 0 <= fixed - 3 * 4 * values - batch <= 4 * steps


def test_deep_models_follow_from_shallower_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config, setting = ModelConfig(**{**SMALL, "depth": 7}), Setting(4, 64)
    continued = predict(config, setting)
    monkeypatch.setattr(memory, "DEEP", 8)
    assert continued.most == pytest.approx(predict(config, setting).most, rel=0.01)


def test_long_sequences_follow_from_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config, setting = ModelConfig(**{**SMALL, "position": {"name": "t5"}}), Setting(1, 256)
    whole = predict(config, setting)
    monkeypatch.setattr(memory, "LONG", 128)
    assert predict(config, setting).most == pytest.approx(whole.most, rel=0.05)


def test_the_largest_batch_fits_and_one_more_row_does_not() -> None:
    config, setting = ModelConfig(**SMALL), Setting(1, 32)
    batch, peak = largest(config, setting, 4_000_000)
    assert batch > 1
    assert peak == predict(config, replace(setting, batch=batch))
    assert peak.most <= 4_000_000 < predict(config, replace(setting, batch=batch + 1)).most


def test_no_row_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "predict", lambda config, setting: Peak(5, 5, 11))
    assert largest(ModelConfig(**SMALL), Setting(), 10) == (0, Peak(5, 5, 11))


@pytest.mark.parametrize("row", [1, 7, 3000])
def test_the_search_finds_the_last_that_fits_of_any_rising_curve(monkeypatch: Any, row: int) -> None:
    def curve(config: ModelConfig, setting: Setting) -> Peak:
        size = setting.length
        return Peak(0, 0, size * size + 50 * size)

    monkeypatch.setattr(memory, "predict", curve)
    budget = row * row + 50 * row + 20
    assert largest(ModelConfig(**SMALL), Setting(), budget, "length")[0] == row


def test_a_length_stops_at_the_models_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "predict", lambda config, setting: Peak(0, 0, setting.length))
    config = ModelConfig(**SMALL, position={"name": "learned", "max_context": 48})
    assert largest(config, Setting(), 10**9, "length")[0] == 48


def test_reversible_plans_keep_what_both_stacks_have() -> None:
    stack = {"name": "residual", "order": "post", "norm": "layer", "dropout": 0.1}
    found = plans(ModelConfig(**SMALL, stack=stack), Setting(chunk=0))
    config, setting = found["reversible chunked"]
    assert config.stack == {"name": "reversible", "norm": "layer", "dropout": 0.1}
    assert config.layer("feedforward", 0) == {"name": "chunked", "chunk": memory.CHUNK}
    assert setting.chunk == memory.CHUNK
    assert found["checkpointed"][1].recompute


def test_settings_that_cannot_be_say_what_can() -> None:
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        Setting(batch=0)
    with pytest.raises(ValueError, match=r"unknown precision 'float16'.* \(accepted: bfloat16, float32\)"):
        Setting(precision="float16")
    with pytest.raises(ValueError, match="budget=0 must be at least 1 byte"):
        largest(ModelConfig(**SMALL), Setting(), 0)


def test_a_ledger_counts_shared_memory_once_and_forgets_what_is_gone() -> None:
    ledger = Ledger()
    with Rehearsal(ledger):
        x = torch.zeros(1000)
        view = x[:10]
        y = x + 1
        assert ledger.live == 8000
        del x, y
        assert ledger.live == 4000
        del view
    assert (ledger.live, ledger.peak) == (0, 8000)


def test_choices_by_numbers_are_drawn_within_their_range() -> None:
    with Rehearsal(Ledger()):
        found = torch.randn(50, 7).argmax(-1)
        order = torch.randn(3, 9).topk(4).indices
    assert (int(found.min()), int(found.max())) == (0, 6)
    assert all(len(set(row)) == 4 and set(row) <= set(range(9)) for row in order.tolist())


def test_asking_numbers_that_are_not_there_is_refused() -> None:
    with Rehearsal(Ledger()), pytest.raises(Unforeseen, match="asks whether something holds"):
        bool((torch.randn(5) > 0).any())
    with Rehearsal(Ledger()), pytest.raises(Unforeseen, match="depends on numbers"):
        (torch.randn(5) > 0).nonzero()


def tiny(row: Row) -> ModelConfig:
    takes = inspect.signature(load(row)).parameters
    spec = {
        "name": row.name,
        **{k: v for k, v in TINY_ARGUMENTS.items() if k in takes},
        **_shrunk(row.preset),
    }
    kind = "encoder" if row.decodes == "encode" else "decoder"
    return ModelConfig(vocab=16, dim=DIM, depth=1, mixer=spec, position=WAVES, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MIXERS if name != "cross"])
def test_every_mixer_of_the_catalog_can_be_rehearsed(name: str) -> None:
    peak = predict(tiny(MIXERS[name]), Setting(2, 16))
    assert 0 < peak.kept < peak.most - peak.fixed
