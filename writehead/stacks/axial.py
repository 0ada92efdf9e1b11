"""Axial Transformer: an outer decoder reads the rows above, an inner one the pixels before in the own row.

Paper     Ho, Kalchbrenner, Weissenborn, Salimans 2019, "Axial Attention in Multidimensional Transformers",
          arXiv:1912.12180
Equation  u = h; u = row(u), unmasked, and u = column(u), masked, in turn; z = shift_right(h) + shift_down(u);
          z = row(z), masked; each layer is pre-norm: x + attention(norm(x)), x + feedforward(norm(x))
State     column layers: keys and values of all finished rows; unmasked row layers: nothing; masked ones: a
          ring of a row; the embedded pixels of the row at hand, and u of the row above
Cost      O(T (height + width)) over the layers: O(T sqrt T)
Decodes   exactly: when a row ends, it goes through the outer decoder once; between row ends a step is the
          inner decoder's only
Differs   channels are columns (width in positions), so there is no exterior encoder over channel slices;
          the position of a pixel rides with the token before it, so in the outer decoder it is one ahead; a
          row's first pixel sees the last one of the row above in the inner decoder too
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from writehead.catalog import MIXERS, Spec, argument
from writehead.config import ModelConfig
from writehead.core.bind import Of, itself
from writehead.core.cache import share_positions
from writehead.core.positions import Positions
from writehead.core.slots import Layout, Store
from writehead.core.state import State
from writehead.mixer import NOTHING, Aux
from writehead.stacks.residual import Block, make_norm, merge_aux


class AxialState(NamedTuple):
    """What the stack remembers of B rows of tokens.

    Attributes:
        columns, rows: of each masked column layer, and of each layer of the inner decoder.
        begun: (B, width, X) the embedded pixels of the image row at hand, the first ones are real.
        above: (B, width, X) the outer decoder's output for the row above it, zeros over the first row.
        seen: (B,) tokens so far.
    """

    columns: tuple[State, ...]
    rows: tuple[State, ...]
    begun: Tensor
    above: Tensor
    seen: Tensor


class Axial(nn.Module):
    """Outer layers, then inner layers, of mixers named "axial"."""

    def __init__(
        self,
        dim: int,
        layers: Sequence[tuple[nn.Module, nn.Module, nn.Module | None]],
        *,
        image_width: int = 32,
        outer: int = 4,
        norm: str = "layer",
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        """Make the stack.

        Args:
            dim: width X.
            layers: mixer, feed-forward layer and None of each layer; `mixers_of` says which mixers.
            image_width: positions of an image row.
            outer: layers of the outer decoder, unmasked rows and masked columns in turn; the rest are inner.
            norm: as in the residual stack.
            eps: the norms' epsilon.
            dropout: on what each sublayer adds.

        Raises:
            ValueError: layers that do not divide into two decoders, or cross-attention.
        """
        super().__init__()
        _check_layers(len(layers), outer)
        if any(cross is not None for _, _, cross in layers):
            raise ValueError("the axial stack has no place for cross-attention")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be from 0 up to 1")
        self.image_width, self.outer = image_width, outer
        self.blocks = nn.ModuleList(
            Block(dim, *layer, order="pre", norm=norm, eps=eps, dropout=dropout, one_norm=False)
            for layer in layers
        )
        self.norm = make_norm(norm, dim, eps)

    @staticmethod
    def mixers_of(config: ModelConfig) -> list[Spec]:
        """The mixer of each layer: the config's, along the axis and with the mask that the layer has.

        Raises:
            ValueError: another mixer, or one whose axis, mask or width is given.
        """
        spec = config.mixer
        if isinstance(spec, tuple) or spec.get("name") != "axial":
            raise ValueError(f"the axial stack is made of one mixer, named 'axial'; got {spec!r}")
        argument(MIXERS, spec, "heads")
        for key in ("axis", "causal", "image_width"):
            if key in spec:
                raise ValueError(f"mixer.{key} is the axial stack's to choose; leave it out")
        width = config.stack.get("image_width", 32)
        outer = config.stack.get("outer", 4)
        kinds = [(1, False) if i % 2 == 0 else (0, True) for i in range(outer)]
        kinds += [(1, True)] * (config.depth - outer)
        return [{**spec, "image_width": width, "axis": axis, "causal": causal} for axis, causal in kinds]

    def init_state(
        self, batch: int, like: Tensor, store: Store = Store(), memories: None = None
    ) -> AxialState:
        """The empty past of `batch` rows; there is no cross-attention, so there are no memories."""
        columns, rows = (
            tuple(share_positions([block.mixer.init_state(batch, like, store) for block in part]))  # type: ignore[union-attr, operator]
            for part in (self.blocks[1 : self.outer : 2], self.blocks[self.outer :])
        )
        line = like.new_zeros(batch, self.image_width, like.shape[-1])
        seen = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return AxialState(columns, rows, line, line.clone(), seen)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        """Bytes of the state after `context` tokens in each of `batch` rows."""
        W, total = self.image_width, 8 * batch
        finished = max(context - 1, 0) // W * W
        for part, tokens in (
            (self.blocks[1 : self.outer : 2], finished),
            (self.blocks[self.outer :], context),
        ):
            mixer: Any = part[0].mixer
            shared = 8 * batch * Layout.of(mixer.pattern.reach, store).slots(tokens, store.capacity)
            total += len(part) * (mixer.state_bytes(batch, tokens, itemsize, store) - shared) + shared
        X: int = mixer.qkv.weight.shape[1]
        return int(total + 2 * batch * W * X * itemsize)

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, AxialState, Aux]]:
        W, inner, norm = self.image_width, [of(b) for b in self.blocks[self.outer :]], of(self.norm)
        outer = self._outer(of)

        def run(x: Tensor, pos: Positions, state: AxialState) -> tuple[Tensor, AxialState, Aux]:
            contents, left = _contents(x, pos, state)
            begun = (state.seen - 1).clamp_min(0) % W
            row = (state.seen - 1).clamp_min(0) // W
            finished = (begun + left) // W * W  # pixels of the rows that end in this call
            columns, above, aux = state.columns, state.above, NOTHING
            most = int(finished.max())
            if most:
                place = torch.arange(most, device=x.device)
                pixel = torch.where(place < finished[:, None], row[:, None] * W + place, -1)
                u, columns, aux = outer(contents[:, :most], Positions(pixel), columns)
                above = torch.cat([above, u], 1)
            z = x + _gather(above, (pos.index - row[:, None] * W).clamp_min(0))
            rows = []
            for block, own in zip(inner, state.rows, strict=True):
                z, (own, _), more = block(z, pos, (own, None))
                rows.append(own)
                aux = merge_aux(aux, more)
            next_row = finished[:, None] + torch.arange(W, device=x.device)
            after = AxialState(
                columns,
                tuple(rows),
                _gather(contents, next_row.clamp_max(contents.shape[1] - 1)),
                _gather(above, next_row),
                state.seen + pos.valid.sum(1),
            )
            return norm(z), after, aux

        return run

    def _outer(self, of: Of) -> Callable[..., tuple[Tensor, tuple[State, ...], Aux]]:
        """Whole rows of pixels through the outer decoder."""
        across, down = self.blocks[0 : self.outer : 2], [of(b) for b in self.blocks[1 : self.outer : 2]]

        def run(
            u: Tensor, pos: Positions, columns: tuple[State, ...]
        ) -> tuple[Tensor, tuple[State, ...], Aux]:
            after, aux = [], NOTHING
            for row, column, own in zip(across, down, columns, strict=True):
                u, more = row.encode(u, pos)  # type: ignore[operator]
                u, (own, _), other = column(u, pos, (own, None))
                after.append(own)
                aux = merge_aux(merge_aux(aux, more), other)
            return u, tuple(after), aux

        return run

    def forward(self, x: Tensor, pos: Positions, state: AxialState) -> tuple[Tensor, AxialState, Aux]:
        """x (B, T, X), at position p the pixel before p -> the stack's output, the state, auxiliary
        values."""
        return self.bind()(x, pos, state)

    def whole(self, x: Tensor, pos: Positions, state: State) -> tuple[Tensor, Aux]:
        """The same from the empty past for whoever wants no state after."""
        y, _, aux = self(x, pos, self.init_state(len(x), x))
        return y, aux


def _contents(x: Tensor, pos: Positions, state: AxialState) -> tuple[Tensor, Tensor]:
    """The embedded pixels of the row at hand and those of this call, left-aligned, at least a row; and how
    many this call brings: the first token of all stands for no pixel."""
    B, T, _ = x.shape
    W = state.begun.shape[1]
    real = pos.index >= 1
    old = (state.seen - 1).clamp_min(0) % W
    place = torch.where(real, old[:, None] + real.cumsum(1) - 1, W + T)
    source = torch.full((B, W + T + 1), W + T, dtype=torch.int64, device=x.device)
    held = torch.arange(W, device=x.device).expand(B, -1)
    source.scatter_(1, torch.where(held < old[:, None], held, W + T), held)
    source.scatter_(1, place, W + torch.arange(T, device=x.device).expand(B, -1))
    pool = torch.cat([state.begun, x, x.new_zeros(B, 1, x.shape[2])], 1)
    return _gather(pool, source[:, : W + T]), real.sum(1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, X), index (B, T) -> (B, T, X)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _check_layers(depth: int, outer: int) -> None:
    if outer < 2 or outer % 2 or outer >= depth:
        raise ValueError(
            f"outer={outer} must be an even number of at least 2 (rows and columns in turn) and below the "
            f"depth of {depth}"
        )
