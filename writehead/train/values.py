"""Strict values: dataclasses from plain values and back, YAML files, `key=value` overrides."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from writehead.core.shapes import check_choice

S = TypeVar("S")


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML (or JSON) file.

    Raises:
        ValueError: not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not text; give a run as YAML") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if values is None or not isinstance(values, dict):
        raise ValueError(f"{path}: a run is a mapping of keys to values; got {type(values).__name__}")
    return values


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Values with `section.key=value` assignments over them; values are YAML.

    Raises:
        ValueError: an assignment without `=`, or one below something that is no mapping.
    """
    result: dict[str, Any] = _copy(values)
    for text in assignments:
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ValueError(f"{text!r} is no override; write key=value, such as optim.lr=0.001")
        inside = result
        for depth, name in enumerate(names[:-1], 1):
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{text!r}: {'.'.join(names[:depth])} holds {inside!r}, not keys")
        try:
            inside[names[-1]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    return result


def at_least(section: str, config: object, **least: float) -> None:
    """Raise unless each named number is finite and at least so much."""
    for name, low in least.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{section}.{name}={value} must be at least {low}")


def section(cls: type[S], where: str, values: Any) -> S:
    """The dataclass that plain values describe.

    Args:
        cls: the dataclass.
        where: its name in messages; "" is a whole run.
        values: by the names of its fields.

    Raises:
        ValueError: an unknown key (with the nearest), or a value that is refused.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'a run'} must be keys and values; got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        check_choice(f"key of {where}" if where else "key", str(key), names)
    return cls(
        **{key: _value(f"{where}.{key}" if where else key, hints[key], v) for key, v in values.items()}
    )


def _value(name: str, hint: Any, value: Any) -> Any:
    """The value as its annotation wants it: lists become tuples, 3e-4 (text in YAML) a number."""
    if is_dataclass(hint):
        return section(typing.cast(type[Any], hint), name, value)
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in union]
    if float in kinds and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if tuple in kinds and isinstance(value, str):
        value = (value,)
    if tuple in kinds and isinstance(value, list | tuple):
        inner = typing.get_args(next(u for u in union if typing.get_origin(u) is tuple))[0]
        return tuple(_value(name, inner, one) for one in value)
    accepted = tuple(kind for kind in (*kinds, int if float in kinds else None) if kind is not None)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        words = {type(None): "nothing", Mapping: "keys and values", tuple: "a list", int: "a whole number"}
        words |= {str: "text", float: "a number", bool: "true or false"}
        raise ValueError(f"{name} must be {' or '.join(words[k] for k in kinds)}; got {value!r}")
    return value


def plain(value: Any) -> Any:
    """Plain values of a dataclass, every default written out."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _copy(value: Any) -> Any:
    return {key: _copy(one) for key, one in value.items()} if isinstance(value, Mapping) else value
