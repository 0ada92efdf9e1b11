"""Checks of what a caller gives: shapes and choices, with errors that name the argument and the nearest valid
value."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def check_shape(name: str, tensor: "Tensor", expected: str, **sizes: int | None) -> None:
    """Raise unless `tensor` has the named dimensions.

    Args:
        name: the argument's name, for the message.
        tensor: what the caller gave.
        expected: dimension letters, as "B T X".
        sizes: the letters whose size is fixed; the others may have any size.

    Raises:
        ValueError: naming the argument, the expected and the given shape.
    """
    letters = expected.split()
    fits = tensor.dim() == len(letters) and all(
        sizes.get(letter) in (None, size) for letter, size in zip(letters, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{x}={sizes[x]}" if sizes.get(x) is not None else x for x in letters)
        raise ValueError(f"{name} must have shape ({wanted}); got {tuple(tensor.shape)}")


def check_choice(what: str, given: str, accepted: Iterable[str]) -> None:
    """Raise unless `given` is one of `accepted`; the message names the nearest and lists all.

    Raises:
        ValueError: unknown choice.
    """
    names = sorted(accepted)
    if given not in names:
        near = get_close_matches(str(given), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {given!r}{hint} (accepted: {', '.join(names)})")


def check_multiple(name: str, value: int, of_name: str, of: int) -> None:
    """Raise unless `value` is a positive multiple of `of`; the message gives the nearest one.

    Raises:
        ValueError: either number is not positive, or the division leaves a rest.
    """
    if of < 1:
        raise ValueError(f"{of_name}={of} must be at least 1")
    if value < 1 or value % of:
        nearest = max(of, round(value / of) * of)
        raise ValueError(
            f"{name}={value} must be a positive multiple of {of_name}={of}; nearest is {nearest}"
        )
