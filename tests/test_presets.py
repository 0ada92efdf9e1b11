"""Presets are runs that load, at the sizes that the papers state, and the toys learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.small import TEXT, begun, write
from writehead.catalog import MIXERS, find
from writehead.cli.models import config_of
from writehead.costs import parameters, skeleton
from writehead.presets import PRESETS
from writehead.train.config import RunConfig
from writehead.train.values import override

PUBLISHED = {  # millions of parameters, from the papers
    "sparse-enwik8": 95,
    "sparse-cifar10": 59,
    "sparse-imagenet64": 152,
    "longformer-text8": 41,
    "etc-base": 166,
    "etc-base-shared": 109,
    "etc-large": 539,
}
TOYS = [name for name in PRESETS if name.endswith("-toy")]


def test_the_published_sizes_are_those_of_the_papers() -> None:
    assert {name: p.published for name, p in PRESETS.items() if p.published is not None} == PUBLISHED


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_at_the_papers_size_has_the_papers_parameters(name: str) -> None:
    preset = PRESETS[name]
    ours = parameters(skeleton(preset.config)) + preset.lacking
    assert ours == pytest.approx(PUBLISHED[name] * 1e6, rel=0.01)
    assert bool(preset.lacking) <= bool(preset.differs), "what is lacking must be said"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_of_its_paper(name: str) -> None:
    preset, run = PRESETS[name], RunConfig.from_dict(PRESETS[name].run)
    assert config_of(name) == preset.config
    found = {find(MIXERS, preset.config.layer("mixer", i)).paper for i in range(preset.config.depth)}
    papers = {"arXiv:1706.03762"} if name.startswith("longformer-t") else {preset.paper}
    assert found == papers, "the causal windows of Longformer are patterns of heads"
    assert RunConfig.from_dict(run.to_dict()) == run


def test_each_of_the_seven_systems_has_its_size_and_a_toy() -> None:
    papers = {
        "1904.10509",
        "1911.02972",
        "1802.05751",
        "1912.12180",
        "2004.05150",
        "2007.14062",
        "2004.08483",
    }
    for names in (TOYS, set(PRESETS) - set(TOYS)):
        assert {PRESETS[name].paper for name in names} == {f"arXiv:{paper}" for paper in papers}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_a_toy_trains(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = PRESETS[name].run
    over = ["loop.steps=2", "data.batch=2", "report.eval_batches=1", "report.sample=null"]
    if given["data"]["kind"] == "image":
        digits = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
        np.savez(tmp_path / "mnist.npz", x_train=digits)
        over.append(f"data.train={tmp_path / 'mnist.npz'}:x_train")
    else:
        over += [f"data.train={write(tmp_path, text=TEXT * 2)}", "data.holdout=0.3"]
    if "tokenizer" in given["data"]:
        over.append("data.tokenizer.vocab=300")
    with begun(override(given, over), tmp_path / "out") as trainer:
        assert trainer.train().is_dir()
        assert trainer.step == 2
