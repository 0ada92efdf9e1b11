"""How many bytes of tensors a call holds at once: counted, not measured, so the same on every machine."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._count(given, old=True)
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            self._count(made)
        return result

    def _count(self, value: object, old: bool = False) -> None:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self.known:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, 0 if old else storage.nbytes()
        self.known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak(step: Callable[[], object]) -> int:
    """Most bytes of tensors that a call holds at once, besides those that were there before."""
    counted = _Live()
    with counted:
        step()
    return counted.peak
