"""What stacks whose layers remember one by one have in common: the layers' states and how large they are."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from writehead.core.cache import KV, share_positions
from writehead.core.positions import Positions
from writehead.core.slots import Layout, Store
from writehead.core.state import State
from writehead.mixer import Aux


class Layers(nn.Module):
    """A stack of `blocks`, each with a mixer that has a state of its own."""

    blocks: nn.ModuleList

    def init_state(
        self, batch: int, like: Tensor, store: Store = Store(), memories: Sequence[State] | None = None
    ) -> tuple[tuple[State, State], ...]:
        """The empty past of `batch` rows.

        Args:
            batch: rows B.
            like: a tensor of the computation's type and device.
            store: how caches are kept.
            memories: what each layer's cross-attention reads.

        Returns:
            For each layer the mixer's state and the memory that its cross-attention reads (or None).
        """
        own = share_positions([mixer.init_state(batch, like, store) for mixer in self._mixers])
        return tuple(zip(own, memories or (None,) * len(own), strict=True))

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        """Bytes of the layers' states after `context` tokens in each of `batch` rows, memories apart."""
        total, layouts, like = 0, list[Layout](), next(self.parameters())
        for mixer in self._mixers:
            total += mixer.state_bytes(batch, context, itemsize, store)
            empty = mixer.init_state(1, like, Store(slack=store.slack))
            if isinstance(empty, KV):
                layouts.append(empty.layout)
        for layout in set(layouts):  # layers of one layout share the positions of their slots
            total -= (layouts.count(layout) - 1) * 8 * batch * layout.slots(context, store.capacity)
        return total

    @property
    def _mixers(self) -> list[Any]:
        return [block.mixer for block in self.blocks]


def stateless(mixer: Any, form: str) -> Callable[[Tensor, Positions, State], tuple[Tensor, State, Aux]]:
    """A mixer's `encode`, or its `whole` if it has one (then it makes no state only to drop it), called as
    its forward is."""
    if form == "whole" and not hasattr(mixer, form):
        return mixer  # type: ignore[no-any-return]
    method = getattr(mixer, form)

    def run(x: Tensor, pos: Positions, state: State) -> tuple[Tensor, State, Aux]:
        y, aux = method(x, pos)
        return y, None, aux

    return run
