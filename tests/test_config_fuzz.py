"""Mutated configs build a model or end in a ValueError: no other error, no hang, no memory."""

import copy
import json
import random

import pytest
from config_seeds import SEEDS

from writehead.config import ModelConfig
from writehead.model.blank import blank

POOL = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    2**31,
    10**12,
    10**30,
    0.5,
    -1.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "mqa",
    [],
    {},
    [1],
    [None],
    ["a"] * 8,
    {"name": "mqa"},
    {"name": 3},
    {"name": "window", "window": 2},
    [{"name": "mha"}],
    {"name": "linear", "factor": 3.0},
    [[]],
    {"x": {}},
]


def places(value, path=()):
    """Every (container, key) inside a config."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner, (*path, key))


def mutated(rng):
    values = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.choice([1, 1, 2, 3])):
        holder, key = rng.choice(list(places(values)))
        action = rng.choice(["replace", "replace", "delete", "rename", "add"])
        if action == "replace":
            holder[key] = copy.deepcopy(rng.choice(POOL))
        elif action == "delete":
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice([str(key) + "s", str(key)[1:], 5, "heads", "pattern"])] = (
                holder.pop(key) if action == "rename" else copy.deepcopy(rng.choice(POOL))
            )
        if not values:
            break
    return values


def tried(values, built):
    """Builds the model, or not with a ValueError; anything else fails."""
    try:
        config = ModelConfig.from_dict(values)
        if config.depth <= 4 and (config.encoder is None or config.encoder.depth <= 4):
            built.append(blank(config))
    except ValueError as error:
        if not str(error):
            raise


@pytest.mark.slow
def test_two_thousand_mutated_configs_build_or_say_why_not():
    rng, built = random.Random(0), []
    for _ in range(1500):
        tried(mutated(rng), built)
    assert 50 < len(built) < 1000
    for _ in range(500):
        text = json.dumps(rng.choice(SEEDS))
        at = rng.randrange(len(text))
        change = rng.choice(["", text[: rng.randrange(20)], rng.choice('{}[],:"0e-9nt')])
        try:
            values = json.loads(text[:at] + change + text[at + rng.randrange(4) :])
        except ValueError:
            continue
        tried(values, built)
