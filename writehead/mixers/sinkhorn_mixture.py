"""The Sinkhorn mixture: some heads read a sorted block and their own, the others read everything.

Paper     Tay, Bahri, Yang, Metzler, Juan 2020, "Sparse Sinkhorn Attention", arXiv:2002.11296 (mixture model)
Equation  y = Sinkhorn(x) + softmax(q . k / sqrt(D)) v of ordinary heads, each with its output matrix
State     that of the Sinkhorn heads, and all keys and values of the ordinary ones
Cost      whole sequence O(T^2 D) an ordinary head; one token O(S D)
Decodes   exactly, as both parts do
Differs   the paper adds both attentions in every head; here each head is of one kind, so that half of them
          cost nothing quadratic. kv_heads: so many write-heads for each of the two kinds
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.cache import KV
from writehead.core.positions import Positions
from writehead.core.shapes import check_multiple
from writehead.core.slots import Store
from writehead.core.work import Call, Work
from writehead.mixer import NOTHING, Aux
from writehead.mixers.sinkhorn import Sinkhorn, SinkhornState
from writehead.mixers.softmax import Softmax
from writehead.positions.base import Scheme


class MixtureState(NamedTuple):
    """The states of both kinds of heads."""

    sorted: SinkhornState
    whole: KV


class SinkhornMixture(nn.Module):
    """Sinkhorn and quadratic heads side by side; their outputs add up."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        quadratic_heads: int | None = None,
        window: int = 32,
        blocks: int = 128,
        iterations: int = 5,
        temperature: float = 0.75,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads, both kinds together.
            kv_heads: key/value heads of each kind; default as many as it has query heads.
            head_dim: width D of a head; default dim / heads.
            quadratic_heads: those that read everything; default half.
            window, blocks, iterations, temperature: as in `Sinkhorn`.
            position: the model's position scheme.

        Raises:
            ValueError: numbers that do not fit, or a position scheme that adds to the scores.
        """
        super().__init__()
        if head_dim is None:
            check_multiple("dim", dim, "heads", heads)
        quadratic = heads // 2 if quadratic_heads is None else quadratic_heads
        if not 1 <= quadratic < heads:
            raise ValueError(
                f"quadratic_heads={quadratic} must be from 1 to {heads - 1}: both kinds are needed; "
                "sinkhorn and mha are the others alone"
            )
        D = head_dim or dim // heads
        self.sorted = Sinkhorn(
            dim, heads=heads - quadratic, kv_heads=kv_heads, head_dim=D, window=window, blocks=blocks,
            iterations=iterations, temperature=temperature, position=position,
        )  # fmt: skip
        self.quadratic = Softmax(dim, heads=quadratic, kv_heads=kv_heads, head_dim=D, position=position)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> MixtureState:
        parts = (part.init_state(batch, like, store) for part in (self.sorted, self.quadratic))
        return MixtureState(*parts)  # type: ignore[arg-type]

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        parts = (self.sorted, self.quadratic)
        return sum(part.state_bytes(batch, context, itemsize, store) for part in parts)

    def work(self, call: Call) -> Work:
        return self.sorted.work(call) + self.quadratic.work(call)

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, MixtureState, Aux]]:
        near, far = of(self.sorted), of(self.quadratic)

        def run(
            x: Tensor, pos: Positions, state: MixtureState | None = None
        ) -> tuple[Tensor, MixtureState, Aux]:
            y, ours, _ = near(x, pos, None if state is None else state.sorted)
            z, kv, _ = far(x, pos, None if state is None else state.whole)
            return y + z, MixtureState(ours, kv), NOTHING

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: MixtureState | None = None
    ) -> tuple[Tensor, MixtureState, Aux]:
        return self.bind()(x, pos, state)
