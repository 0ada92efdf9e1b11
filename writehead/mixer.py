"""The two interfaces of mixers, and the laws in words (`laws.py` checks them).

A mixer is a function of (state, chunk), and training is that function applied once to the empty state.
"""

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from torch import Tensor

from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import State

Aux: TypeAlias = Mapping[str, Tensor]  # auxiliary losses and extra streams by name; empty for most mixers
NOTHING: Aux = {}


class CausalMixer(Protocol):
    """Mixes tokens along time, reading only the past; the past is `state` and nothing else.

    Laws:
        split    a sequence given in any pieces, the state passed along, gives the outputs, the later
                 behaviour and the gradients of one call
        causal   changing token t changes no output before t
        select   row i of the output depends on row i of x, pos and state only; rows may be reordered,
                 dropped, joined
        padding  a token at position -1 changes nothing but its own (meaningless) output
        budget   the bytes of the state are those that `state_bytes` predicts, and grow as the catalog row
                 says
        rewind   after rewind(state, n) the state is the one before the last n tokens; a state that cannot,
                 says so
    """

    def init_state(self, batch: int, like: Tensor, store: Store = ...) -> State:
        """The empty past of `batch` rows, of the type and on the device of `like`."""

    def forward(self, x: Tensor, pos: Positions, state: State = None) -> tuple[Tensor, State, Aux]:
        """Mix T >= 1 new tokens x (B, T, X) standing at `pos` into the past; None is the empty one.

        Returns y (B, T, X), the state after the tokens, and auxiliary values. Consumes `state`: afterwards
        only the returned one may be used; `select` makes an independent copy.
        """

    # A mixer whose state is dear may also offer `whole(x, pos) -> (y, aux)`: `forward` from the empty past
    # for whoever wants no state after. Stacks use it where it is.

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = ...) -> int:
        """Bytes of the state after `context` tokens in each of `batch` rows, for values of `itemsize`
        bytes."""


class EncoderMixer(Protocol):
    """Mixes all positions at once. A class offers `encode`, `forward`, or both.

    A class may say `reads`, the names in `pos.streams` that callers may give it, and `ordered = True`: it
    tells the order of tokens itself, so that a model needs no position scheme.
    """

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """x (B, T, X), padding at position -1 -> y (B, T, X) and auxiliary values."""
