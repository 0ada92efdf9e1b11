"""Rotary settings of Hugging Face configs: `rope_parameters`, before 5.x `rope_theta`, `rope_scaling`."""

from collections.abc import Mapping
from typing import Any

from writehead.convert.errors import shown
from writehead.convert.families.base import Fields

YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
DYNAMIC = {"name": "dynamic"}  # which Rotary refuses, saying why


def read_rotary(fields: Fields, max_context: int) -> dict[str, Any]:
    """The position spec that a config describes.

    Raises:
        ValueError: a scaling or a setting that Rotary does not have, or settings that contradict each other.
    """
    theta, old = fields.take("rope_theta", None), fields.take("rope_scaling", None)
    new = fields.take("rope_parameters", None)
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{fields.what}: {key}={shown(value)} must be an object")
    given: dict[str, Any] = dict(new or old or {})
    if old is not None and new is not None and _settings(old) != _settings(new):
        raise ValueError(f"{fields.what}: rope_scaling and rope_parameters disagree")
    if theta is not None and given.setdefault("rope_theta", theta) != theta:
        raise ValueError(
            f"{fields.what}: rope_theta={shown(theta)}, but rope_parameters say {shown(given['rope_theta'])}"
        )
    rope = Fields(given, f"{fields.what}: rope_parameters")
    kind = rope.take("rope_type", "default", "type")
    rope.only("partial_rotary_factor", 1.0, 1, None)
    spec: dict[str, Any] = {"name": "rotary", "base": rope.number("rope_theta", 10000.0)}
    scaling = _scaling(rope, kind, max_context)
    rope.done()
    return spec if scaling is None else spec | {"scaling": scaling}


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling without the base, in today's spelling."""
    return {"rope_type" if k == "type" else k: v for k, v in values.items() if k != "rope_theta"}


def _scaling(rope: Fields, kind: Any, max_context: int) -> dict[str, Any] | None:
    original = rope.maybe_whole("original_max_position_embeddings")
    if kind == "default":
        return None
    if kind == "dynamic":
        unscaled = rope.number("factor", 1.0) == 1 or (original is not None and max_context <= original)
        return None if unscaled else DYNAMIC
    if kind == "linear":
        return {"name": "linear", "factor": rope.number("factor", None)}
    if kind == "llama3":
        factors = {key: rope.number(key, None) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return {"name": "llama3", "original_context": original or max_context, **factors}
    if kind == "yarn":
        spec = {
            "name": "yarn",
            "factor": rope.number("factor", None),
            "original_context": original or max_context,
        }
        for key in YARN[:-1]:
            if rope.take(key, None):
                spec[key] = rope.number(key, None)
        return spec if rope.truth("truncate", True) else spec | {"truncate": 0.0}
    raise ValueError(
        f"{rope.what}: rope_type={shown(kind)} is not supported (accepted: default, linear, llama3, yarn)"
    )


def write_rotary(position: Mapping[str, Any]) -> dict[str, Any]:
    """The keys for a position spec in full, in both spellings, so that older readers do not miss them."""
    base, scaling = position["base"], position["scaling"]
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if scaling is None:
        return {"rope_theta": base, "rope_parameters": parameters}
    renamed = {"name": "rope_type", "original_context": "original_max_position_embeddings"}
    settings = {renamed.get(key, key): value for key, value in scaling.items()}
    if "truncate" in settings:
        settings["truncate"] = bool(settings["truncate"])
    return {
        "rope_theta": base,
        "rope_scaling": settings,
        "rope_parameters": parameters | settings,
    }
