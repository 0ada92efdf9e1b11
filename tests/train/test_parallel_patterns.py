"""Two processes agree with one where layers keep averages, hand something on or are computed a second time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.train.small import log, tensors, train, values, write
from tests.train.test_resume import LABELLED
from tests.train.two_processes import launch
from writehead.mixers.cluster_former import ClusterFormer
from writehead.mixers.routing import Routing
from writehead.train.parallel import share

ROUTING = {"name": "routing", "heads": 2, "clusters": 3, "window": 4, "local_window": 4}
LSH = {"name": "reformer", "heads": 2, "buckets": 4, "window": 4}
DEEP = {"name": "reversible", "dropout": 0.0}
RANDOM = {"name": "reversible", "dropout": 0.1}
CLUSTERS = {"name": "cluster_former", "heads": 2, "clusters": 3, "window": 8, "refit": 2}


def language(text: str, mixer: Any, stack: dict[str, Any], **loop: Any) -> dict[str, Any]:
    model = {"mixer": mixer, "stack": stack, "position": {"name": "sinusoidal"}}
    return values(text, model=model, loop={"steps": 4, **loop})


def labelled(text: str, mixer: Any, stack: dict[str, Any]) -> dict[str, Any]:
    given = values(text, data={"kind": "labelled", "length": 40, "batch": 4}, loop={"steps": 4})
    model = {"kind": "encoder", "dim": 16, "depth": 2, "mixer": mixer, "stack": stack}
    return given | {"model": {**model, "position": {"name": "sinusoidal"}}}


def cases(folder: Path) -> dict[str, tuple[dict[str, Any], int, int, tuple[str, ...], float]]:
    """Run, pieces of one process, pieces of each of two, strategies, tolerance of losses.

    Centroids move once a piece, so those of a run in two pieces are others than those of a run in one.
    """
    text, labels, both = write(folder), write(folder, "labelled.tsv", LABELLED), ("ddp", "fsdp")
    return {
        "centroids": (language(text, ROUTING, DEEP), 1, 1, both, 2e-5),
        "recomputed": (
            language(text, ROUTING, {"name": "residual", "dropout": 0.0}, recompute=True),
            1, 1, both, 2e-5,
        ),
        "pieces": (language(text, [LSH, {"name": "mqa", "heads": 2}], RANDOM), 4, 2, both, 2e-5),
        "bfloat16": (language(text, LSH, RANDOM, precision="bfloat16"), 2, 1, both, 5e-3),
        "clusters": (labelled(labels, CLUSTERS, DEEP), 1, 1, both, 2e-5),
        "slots": (labelled(labels, {"name": "luna_encoder", "heads": 2}, RANDOM), 2, 1, both, 2e-5),
    }  # fmt: skip


def in_pieces(run: dict[str, Any], pieces: int, **loop: Any) -> dict[str, Any]:
    return {**run, "loop": {**run["loop"], "accumulate": pieces, **loop}}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors; the optimiser has more where DDP gives zeros for gradients that there are not."""
    return {name: tensor for name, tensor in tensors(checkpoint).items() if name.startswith("model/")}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_give_the_losses_gradients_weights_and_centroids_of_one(tmp_path: Path) -> None:
    jobs, last = [], {}
    for name, (run, one, two, strategies, _) in cases(tmp_path).items():
        last[name] = train(in_pieces(run, one), tmp_path / f"{name}-one").name
        for strategy in strategies:
            out = str(tmp_path / f"{name}-{strategy}")
            jobs.append({"run": in_pieces(run, two, strategy=strategy), "out": out, "resume": "never"})
    launch(jobs, tmp_path)
    for name, (*_, strategies, tolerance) in cases(tmp_path).items():
        for strategy in strategies:
            one, other = tmp_path / f"{name}-one", tmp_path / f"{name}-{strategy}"
            for a, b in zip(log(one), log(other), strict=True):
                if "train/loss" in a:
                    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=tolerance), name
                    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance), name
            mine, yours = weights(one / last[name]), weights(other / last[name])
            assert mine.keys() == yours.keys()
            for key, tensor in mine.items():
                torch.testing.assert_close(yours[key], tensor, rtol=1e-3, atol=10 * tolerance)


def test_sharing_reaches_every_layer_that_keeps_averages_and_no_other() -> None:
    model = nn.ModuleList([Routing(16, heads=2), ClusterFormer(16, heads=2), nn.Linear(2, 2)])
    assert not model[0].centroids.together
    assert not model[1].together
    share(model)
    assert model[0].centroids.together
    assert model[1].together
    assert not hasattr(model[2], "together")
