"""The reversible stack: two streams from which every layer's input can be found again, so none is kept.

Paper     Kitaev, Kaiser, Levskaya 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451; Gomez et al.
          2017, "The Reversible Residual Network", arXiv:1707.04585
Equation  y1 = x1 + mixer(norm(x2)), y2 = x2 + feedforward(norm(y1)); both streams begin as the embeddings
          and end as their mean or side by side, normalised
State     the mixers' states, one a layer, as in the residual stack
Cost      the layers', and each a second time in the backward pass; activations of one layer at any depth
Decodes   as its mixers do
Differs   cross-attention is a third coupling between the two, after which the streams have changed their
          roles; streams are kept in float32 or wider, whatever the weights' type; what a layer hands on
          beside them (Luna's slots) is kept for each layer
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice
from writehead.core.state import State
from writehead.mixer import NOTHING, Aux
from writehead.ops.couplings import Branch, Coupling, Drift, plain, reversible
from writehead.stack import Layers, stateless
from writehead.stacks.residual import make_norm, merge_aux

OUTPUTS = ("mean", "concat")
After = tuple[tuple[State, State], ...]


class Pair(nn.Module):
    """One layer: a mixer, cross-attention if given, and a feed-forward layer, each behind its norm."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        feedforward: nn.Module,
        cross: nn.Module | None,
        *,
        norm: str,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mixer, self.feedforward, self.cross, self.dropout = mixer, feedforward, cross, dropout
        self.mixer_norm = make_norm(norm, dim, eps)
        self.cross_norm = None if cross is None else make_norm(norm, dim, eps)
        self.feedforward_norm = make_norm(norm, dim, eps)

    def branches(self, of: Of, form: str) -> Iterable[tuple[Branch, tuple[nn.Module, nn.Module]]]:
        """What each coupling adds, and the modules it uses; form: the mixer's method."""
        mix = of(self.mixer) if form == "forward" else stateless(self.mixer, form)
        yield self._behind(mix, of(self.mixer_norm)), (self.mixer, self.mixer_norm)
        if self.cross is not None and self.cross_norm is not None:
            yield self._behind(of(self.cross), of(self.cross_norm)), (self.cross, self.cross_norm)
        feed = of(self.feedforward)

        def forward(x: Tensor, pos: Positions, state: State) -> tuple[Tensor, State, Aux]:
            y, aux = feed(x)
            return y, None, aux

        yield self._behind(forward, of(self.feedforward_norm)), (self.feedforward, self.feedforward_norm)

    def _behind(self, part: Branch, norm: Callable[[Tensor], Tensor]) -> Branch:
        dtype = next(self.parameters()).dtype

        def run(x: Tensor, pos: Positions, state: State) -> tuple[Tensor, State, Aux]:
            y, state, aux = part(norm(x if x.dtype == dtype else x.to(dtype)), pos, state)
            return F.dropout(y, self.dropout) if self.training and self.dropout else y, state, aux

        return run


class Reversible(Layers):
    """Layers one after the other, then a last norm.

    Attributes:
        drift: with measure_drift, how exactly the last backward pass found the stack's input again.
    """

    def __init__(
        self,
        dim: int,
        layers: Sequence[tuple[nn.Module, nn.Module, nn.Module | None]],
        *,
        norm: str = "rms",
        eps: float = 1e-6,
        dropout: float = 0.0,
        output: str = "mean",
        last_norm: bool = True,
        measure_drift: bool = False,
    ) -> None:
        """Make the stack.

        Args:
            dim: width X of each stream.
            layers: mixer, feed-forward layer and cross-attention (or None) of each layer.
            norm: one of `residual.NORMS`.
            eps: the norms' epsilon.
            dropout: on what each sublayer adds.
            output: "mean" of the streams, or "concat": side by side, 2 X wide.
            last_norm: normalise the output.
            measure_drift: compare the input found again with the true one, which is kept for it.
        """
        super().__init__()
        check_choice("output", output, OUTPUTS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be from 0 up to 1")
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps} must be from 0 up to 1; 1e-6 is usual")
        self.blocks = nn.ModuleList(
            Pair(dim, *layer, norm=norm, eps=eps, dropout=dropout) for layer in layers
        )
        self.output, width = output, 2 * dim if output == "concat" else dim
        self.norm = make_norm(norm, width, eps) if last_norm else nn.Identity()
        self.drift = Drift() if measure_drift else None

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, After, Aux]]:
        chain, end = self._chain(of, "forward"), self._end(of)

        def run(x: Tensor, pos: Positions, state: After) -> tuple[Tensor, After, Aux]:
            a, b, states, aux = chain(x, pos, state, True)
            return end(a, b, x.dtype), _by_layer(states, state), aux

        return run

    def forward(self, x: Tensor, pos: Positions, state: After) -> tuple[Tensor, After, Aux]:
        """x (B, T, X) -> the stack's output, the layers' states, auxiliary values of all layers."""
        return self.bind()(x, pos, state)

    def whole(self, x: Tensor, pos: Positions, state: After) -> tuple[Tensor, Aux]:
        """The same from the empty past for whoever wants no state after: then none is kept."""
        a, b, _, aux = self._chain(itself, "whole")(x, pos, state, False)
        return self._end(itself)(a, b, x.dtype), aux

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """The bidirectional form: x (B, T, X) -> the stack's output and auxiliary values."""
        chain = self._chain(itself, "encode")
        a, b, _, aux = chain(x, pos, ((None, None),) * len(self.blocks), False)
        return self._end(itself)(a, b, x.dtype), aux

    def _chain(
        self, of: Of, form: str
    ) -> Callable[[Tensor, Positions, After, bool], tuple[Tensor, Tensor, list[State], Aux]]:
        branches = [list(block.branches(of, form)) for block in self.blocks]  # type: ignore[operator]

        def run(
            x: Tensor, pos: Positions, state: After, keep: bool
        ) -> tuple[Tensor, Tensor, list[State], Aux]:
            couplings = [
                Coupling(branch, modules, past, keep, getattr(modules[0], "streams", ()))
                for layer, own in zip(branches, state, strict=True)
                for (branch, modules), past in zip(layer, _pasts(own, len(layer)), strict=True)
            ]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if torch.is_grad_enabled():
                a, b, states, found = reversible(x, pos, couplings, self.drift)
            else:
                a, b, states, found = plain(x, pos, couplings)
            aux = NOTHING
            for more in found:
                aux = merge_aux(aux, more)
            return a, b, states, aux

        return run

    def _end(self, of: Of) -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
        norm, concat = of(self.norm), self.output == "concat"

        def run(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
            both = torch.cat([a, b], -1) if concat else (a + b) / 2
            return norm(both.to(dtype))  # type: ignore[no-any-return]

        return run


def _pasts(own: tuple[State, State], couplings: int) -> tuple[State, ...]:
    """A layer's state by couplings: mixer, cross-attention if there is one, feed-forward layer."""
    return (own[0], own[1], None) if couplings == 3 else (own[0], None)


def _by_layer(states: list[State], before: After) -> After:
    per = len(states) // len(before)
    return tuple(
        (states[i * per], states[i * per + 1] if per == 3 else old[1]) for i, old in enumerate(before)
    )
