"""A training step without its memory: every tensor is accounted for, none of the large ones is there.

Numbers are fake tensors, which have a shape, a type and a device but no values. Whole numbers and truth
values are real, since positions, masks and plans of blocks decide which tensors follow. Where a mixer chooses
by its numbers (an argmax, an order), the choice is drawn at random, evenly.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
LAST = {aten.argmax.default, aten.argmin.default}  # give indices
BEST = {aten.max.dim, aten.min.dim}
PAIRS = BEST | {aten.topk.default, aten.sort.default, aten.sort.stable}  # give values and indices
VALUES = {aten._local_scalar_dense.default, aten.item.default}
ALIKE = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Unforeseen(ValueError):
    """What a step does depends on values that a rehearsal does not have."""


class Ledger:
    """Bytes of the tensors that are alive.

    Attributes:
        live: now.
        peak: the most since it was last set.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once however many tensors share it, until the last of them is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class Rehearsal(TorchDispatchMode):
    """Within it tensors are made and computed with, but for their values.

    Attributes:
        ledger: what they would hold.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger, self._fake = ledger, FakeTensorMode(allow_non_fake_inputs=True)
        self._dice = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = self._run(func, args, kwargs)
        for value in tree_flatten(found)[0]:
            if isinstance(value, Tensor):
                self.ledger.note(value)
        return found

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if not given:
            found = self._shapes(func, args, kwargs)
            return found if _large(found) else func(*args, **kwargs)
        if not any(isinstance(value, FakeTensor) for value in given):
            return tree_map(lambda t: self._fake.from_tensor(t) if _large(t) else t, func(*args, **kwargs))
        if func in VALUES:
            if given[0].dtype == torch.bool:
                raise Unforeseen("the step asks whether something holds of numbers that a rehearsal lacks")
            return 1.0 if given[0].is_floating_point() else 1
        if func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            return args[0]  # real whole numbers that would take values which are not there
        found = self._shapes(func, args, kwargs)
        if func in LAST:
            size = args[0].numel() if len(args) < 2 or args[1] is None else args[0].shape[args[1]]
            return torch.randint(max(1, size), found.shape, generator=self._dice)
        if func in PAIRS:
            return found[0], self._order(args[0], found[1], args[1] if func in BEST else None)
        if func in ALIKE and not found.is_floating_point():
            return torch.full(found.shape, _filling(func, args), dtype=found.dtype)
        return found

    def _shapes(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in INDEXED:
            args = [args[0], _numbered(args[1]), *args[2:]]
        try:
            with self._fake:
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Unforeseen(f"what {error} gives depends on numbers that a rehearsal lacks") from None

    def _order(self, x: Tensor, index: Tensor, best: int | None) -> Tensor:
        """Random indices in place of those of the largest or smallest values along a dimension."""
        if best is not None:
            return torch.randint(max(1, x.shape[best]), index.shape, generator=self._dice)
        dim = next((d for d in range(x.dim()) if x.shape[d] != index.shape[d]), x.dim() - 1)
        drawn = torch.rand(x.shape, generator=self._dice).argsort(dim)
        return drawn.narrow(dim, 0, index.shape[dim]).contiguous()


def _large(value: Any) -> bool:
    """Is it a tensor of numbers that a rehearsal leaves out?"""
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1


def _filling(func: Any, args: Sequence[Any]) -> Any:
    if func in (aten.full_like.default, aten.new_full.default):
        return args[-1]
    return 1 if func in (aten.ones_like.default, aten.new_ones.default) else 0


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices by truth values as numbers, which tell how many there are."""
    found: list[Tensor | None] = []
    for index in indices:
        whole = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero(as_tuple=True) if whole and index is not None else [index]
    return found
