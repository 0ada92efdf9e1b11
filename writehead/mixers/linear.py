"""Linear attention: a feature map in place of the softmax turns causal attention into running sums.

Paper     Katharopoulos, Vyas, Pappas, Fleuret 2020, "Transformers are RNNs: Fast Autoregressive Transformers
          with Linear Attention", arXiv:2006.16236
Equation  y_t = p(q_t) S_t / (p(q_t).z_t + 1e-6), S_t = sum_{s<=t} p(k_s) v_s^T, z_t = sum_{s<=t} p(k_s),
          p(x) = elu(x) + 1
State     S with z as its last column: G D (D + 1) values in float32, whatever the context
Cost      whole sequence O(T (C D + D^2) H) in chunks of C tokens; one token O(D^2 H)
Decodes   exactly: a decode step is the same call with T = 1; the sums cannot rewind
Differs   chunks in place of the paper's prefix-sum kernel, equal up to rounding; rotary or infused positions
          act before the feature map; with kv_heads < heads the state shrinks by that factor
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_shape
from writehead.core.slots import Store
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops import scan
from writehead.ops.features import Elu, FeatureMap
from writehead.ops.scan_chunks import Rule
from writehead.positions.base import NoPosition, Scheme, has

EPS = 1e-6


class KernelState(NamedTuple):
    """The past, summed up.

    Attributes:
        sums: over every token.
        drawn: which draw of the random features made them.
    """

    sums: scan.Sums
    drawn: int


class Kernel(nn.Module):
    """Causal attention through a feature map: what the systems of this family share."""

    def __init__(
        self, dim: int, qkv: QKV, features: FeatureMap, rule: Rule, bias: str, position: Scheme | None
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            qkv: the projection, made by `shared_heads`.
            features: the map of queries and keys.
            rule: of the denominator.
            bias: "all" gives the output projection one.
            position: the model's position scheme.

        Raises:
            ValueError: a scheme that adds to scores.
        """
        super().__init__()
        self.qkv, self.features, self.rule = qkv, features, rule
        self.out = nn.Linear(qkv.heads * qkv.head_dim, dim, bias=bias == "all")
        self.position = NoPosition() if position is None else position
        if has(self.position, "bias"):
            raise ValueError(
                f"{type(self.position).__name__} positions add to scores, which attention through features "
                "does not have; use rotary, infused, sinusoidal, learned or none"
            )

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> KernelState:
        """The empty sums, in float32 or wider: a store's capacity, slack and type concern caches only."""
        G, D, f = self.qkv.kv_heads, self.qkv.head_dim, self.features
        return KernelState(scan.empty(batch, G, f.width, D, like, f.rescale), f.drawn)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        D, f = self.qkv.head_dim, self.features
        return batch * self.qkv.kv_heads * (f.width * (D + 1) + f.rescale) * max(itemsize, 4)

    def work(self, call: Call) -> Work:
        H, G, D, M = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim, self.features.width
        full, rest = divmod(call.tokens, scan.CHUNK)
        pairs = 0 if call.tokens == 1 else call.batch * (full * scan.CHUNK**2 + rest**2)
        state = self.state_bytes(call.batch, call.context, call.itemsize, call.store)
        return Work(
            flops=2 * call.rows * (products(self.qkv, self.out) + self.features.products)
            + 2 * call.rows * (H + G) * M * (D + 1)
            + 2 * pairs * H * (M + D + 1),
            weights=values(self.qkv, self.out) + self.features.held,
            state_read=state,
            state_written=state,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, KernelState, Aux]]:
        project, out, rule, f, start = (
            self._project(of),
            of(self.out),
            self.rule,
            self.features,
            self.init_state,
        )
        gate = self._gate(of)

        def run(
            x: Tensor, pos: Positions, state: KernelState | None = None
        ) -> tuple[Tensor, KernelState, Aux]:
            (q, k, gain), v = project(x, pos)
            state = start(len(x), x) if state is None else state
            if state.drawn != f.drawn:
                raise ValueError(
                    f"the state was made with draw {state.drawn} of the random features, the mixer now has "
                    f"draw {f.drawn}: begin from an empty state after redraw()"
                )
            padding, decay = pos.once(_padding, pos), None
            if gate is not None:
                decay, gain = gate(x)
            if padding is not None:
                k = k.masked_fill(padding[..., None], 0)
                gain = None if gain is None else gain.masked_fill(padding, scan.NOTHING)
                decay = None if decay is None else decay.masked_fill(padding, 0)
            y, sums = scan.scan(q, k, v, state.sums, rule, decay=decay, gain=gain)
            return out(y.flatten(2)), KernelState(sums, state.drawn), NOTHING

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: KernelState | None = None
    ) -> tuple[Tensor, KernelState, Aux]:
        return self.bind()(x, pos, state)

    def _gate(self, of: Of) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """Log decay and log gain (B, T, G) of the tokens x, for mixers that forget."""
        return None

    def _project(self, of: Of) -> Callable[[Tensor, Positions], tuple[Any, Tensor]]:
        qkv, features, X, scheme = of(self.qkv), of(self.features), self.qkv.weight.shape[1], self.position
        infuse, rotate = scheme.infuse if has(scheme, "infuse") else None, scheme.rotate
        turns, ends = has(scheme, "rotate"), scheme.max_context is not None

        def run(x: Tensor, pos: Positions) -> tuple[Any, Tensor]:
            B, T = pos.index.shape
            if x.shape != (B, T, X):
                check_shape("x", x, "B T X", B=B, T=T, X=X)
            if ends:
                scheme.check_context(pos)
            heads, v = qkv(x) if infuse is None else qkv(x, infuse(x, pos))
            return features(rotate(heads, pos) if turns else heads), v

        return run


class TwoWay(Kernel):
    """The same with a bidirectional form, in which every token reads every other."""

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        (q, k, gain), v = self._project(itself)(x, pos)
        padding = pos.once(_padding, pos)
        if padding is not None:
            k = k.masked_fill(padding[..., None], 0)
            gain = None if gain is None else gain.masked_fill(padding, scan.NOTHING)
        if gain is not None:
            k = k * (gain - gain.detach().amax(1, keepdim=True)).exp()[..., None]
        return self.out(scan.whole(q, k, v, self.rule).flatten(2)), NOTHING


class Linear(TwoWay):
    """Attention through elu(x) + 1."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G, a divisor of H; default H. The state has one S for each.
            head_dim: width D of a head; default dim / heads.
            bias: which projections have one: "none", "qkv" or "all".
            position: the model's position scheme.

        Raises:
            ValueError: numbers of heads that do not divide, or a position scheme that adds to scores.
        """
        qkv = shared_heads(dim, heads, kv_heads, head_dim, bias)
        features = Elu(heads, qkv.kv_heads, qkv.head_dim)
        super().__init__(dim, qkv, features, Rule(EPS, floor=False), bias, position)


def shared_heads(dim: int, heads: int, kv_heads: int | None, head_dim: int | None, bias: str) -> QKV:
    """The projection of a mixer with these options.

    Raises:
        ValueError: numbers of heads that do not divide, or an unknown bias.
    """
    check_choice("bias", bias, ("none", "qkv", "all"))
    return QKV(dim, heads, kv_heads, head_dim, bias != "none")


def smallest(dtype: torch.dtype = torch.float32) -> float:
    """A floor for denominators that are never 0 but for underflow."""
    return torch.finfo(dtype).tiny


def _padding(pos: Positions) -> Tensor | None:
    """(B, T, 1), True at padding; None where there is none."""
    return None if pos.start is not None else ~pos.valid[..., None]
