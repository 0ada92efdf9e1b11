"""Patterns to and from plain values, for configs."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from writehead.core.pattern.base import And, Or, Pattern, PerHead
from writehead.core.pattern.image import Image1D, Image2D
from writehead.core.pattern.plain import Causal, Full, Leading, Readers, Span, Window
from writehead.core.pattern.scattered import Random
from writehead.core.pattern.strided import Axis, Block, Blocks, Dilated, Fixed, Strided
from writehead.core.shapes import check_choice

PATTERNS: dict[str, type[Pattern]] = {
    "full": Full,
    "causal": Causal,
    "window": Window,
    "leading": Leading,
    "span": Span,
    "readers": Readers,
    "strided": Strided,
    "fixed": Fixed,
    "dilated": Dilated,
    "block": Block,
    "blocks": Blocks,
    "axis": Axis,
    "random": Random,
    "image_1d": Image1D,
    "image_2d": Image2D,
    "and": And,
    "or": Or,
    "per_head": PerHead,
}


def to_spec(pattern: Pattern) -> dict[str, Any]:
    """The pattern as plain values for a config: {"name": "window", "window": 256, "after": 0}."""
    name = next(name for name, kind in PATTERNS.items() if kind is type(pattern))
    values = {f.name: getattr(pattern, f.name) for f in fields(pattern)}  # type: ignore[arg-type]
    return {"name": name} | {key: _plain(v) for key, v in values.items()}


def _plain(value: Any) -> Any:
    """A field as plain values."""
    if isinstance(value, Pattern):
        return to_spec(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def from_spec(spec: Mapping[str, Any] | Pattern) -> Pattern:
    """The pattern that a config describes.

    Raises:
        ValueError: unknown name or field, or a value that the pattern refuses.
    """
    if isinstance(spec, Pattern):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"a pattern is a mapping such as {{'name': 'causal'}}; got {spec!r}")
    name = str(spec.get("name"))
    check_choice("pattern", name, PATTERNS)
    kinds = {f.name: f for f in fields(PATTERNS[name])}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in spec.items():
        if key != "name":
            check_choice(f"field of pattern {name!r}", str(key), kinds)
            values[key] = _value(f"field {key!r} of pattern {name!r}", value, kinds[key].type)
    missing = [key for key, f in kinds.items() if key not in values and f.default is MISSING]
    if missing:
        raise ValueError(f"pattern {name!r} needs {', '.join(missing)}; got {dict(spec)}")
    return PATTERNS[name](**values)


def _value(what: str, value: Any, kind: Any) -> Any:
    """A field's value out of a spec's: a whole number, a pattern, or several."""
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{what} must be int; got {value!r}")
        return value
    if kind is Pattern:
        if not isinstance(value, Mapping | Pattern):
            raise ValueError(f"{what} must be a pattern; got {value!r}")
        return from_spec(value)
    numbers = kind == tuple[int, ...]
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{what} must be a list of {'whole numbers' if numbers else 'patterns'}; got {value!r}"
        )
    if numbers:
        return tuple(_value(what, v, int) for v in value)
    return tuple(map(from_spec, value))
