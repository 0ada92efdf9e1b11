"""Random Feature Attention: random features of queries and keys of length 1, with or without a forget gate.

Paper     Peng, Pappas, Yogatama, Schwartz, Smith, Kong 2021, "Random Feature Attention", arXiv:2103.02143
Equation  y_t = p(q_t) S_t / max(p(q_t).z_t, eps), S_t = f_t S_{t-1} + g_t p(k_t) v_t^T, z_t likewise;
          f_t = g_t = 1, or gated f_t = sigmoid(w.x_t + b), g_t = 1 - f_t for each key/value head;
          p(x) = R^-1/2 [sin w_r.x, cos w_r.x] ("gaussian") or R^-1/2 relu(w_r.x) ("arccos") of x / |x|,
          w_r = sigma * e_r with normal e_r and a learned sigma for each key/value head
State     S with z as its last column: G M (D + 1) values in float32, whatever the context; M = 2 R or R
Cost      whole sequence O(T M (C + D) H) in chunks of C tokens; one token O(M D H)
Decodes   exactly: a decode step is the same call with T = 1; the sums cannot rewind
Differs   one denominator rule on every path (the released code has three that disagree); eps is 0.1 for
          features scaled by R^-1/2 where it has 1.0 for ones scaled by 0.1. Directions are drawn once,
          saved, and replaced by `ops.features.redraw` only, where the code samples a pool in each training
          step. The gated form is causal only
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of
from writehead.core.work import Call, Work, products, values
from writehead.mixers.linear import Kernel, TwoWay, shared_heads
from writehead.ops.features import Unit
from writehead.ops.scan import wide
from writehead.ops.scan_chunks import Rule
from writehead.positions.base import Scheme


class RFA(TwoWay):
    """Attention through features of unit vectors."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        features: int = 64,
        kernel: str = "gaussian",
        draw: str = "independent",
        eps: float = 0.1,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G, a divisor of H; default H.
            head_dim: width D of a head; default dim / heads.
            bias: which projections have one: "none", "qkv" or "all".
            features: random directions of each key/value head.
            kernel: "gaussian" or "arccos".
            draw: "independent", "orthogonal" or "regularised" directions.
            eps: the least denominator; a Gaussian estimate may be negative.
            position: the model's position scheme.

        Raises:
            ValueError: an option that is not accepted, or a position scheme that adds to scores.
        """
        qkv = shared_heads(dim, heads, kv_heads, head_dim, bias)
        made = Unit(heads, qkv.kv_heads, qkv.head_dim, features, draw, kernel)
        super().__init__(dim, qkv, made, _rule(eps), bias, position)


class GatedRFA(Kernel):
    """The same with a gate for each key/value head that forgets; causal only."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        features: int = 64,
        kernel: str = "gaussian",
        draw: str = "independent",
        eps: float = 0.1,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer; the arguments are those of `RFA`."""
        qkv = shared_heads(dim, heads, kv_heads, head_dim, bias)
        made = Unit(heads, qkv.kv_heads, qkv.head_dim, features, draw, kernel)
        super().__init__(dim, qkv, made, _rule(eps), bias, position)
        self.gate = nn.Linear(dim, qkv.kv_heads)
        nn.init.normal_(self.gate.weight, std=dim**-0.5)
        nn.init.zeros_(self.gate.bias)

    def work(self, call: Call) -> Work:
        own = Work(flops=2 * call.rows * products(self.gate), weights=values(self.gate))
        return super().work(call) + own

    def _gate(self, of: Of) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        gate = of(self.gate)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            open_ = gate(x)
            open_ = open_.to(wide(open_.dtype))
            return F.logsigmoid(open_), F.logsigmoid(torch.neg(open_))

        return run


def _rule(eps: float) -> Rule:
    if eps <= 0:
        raise ValueError(f"eps={eps} must be above 0: a Gaussian estimate of a kernel may be negative")
    return Rule(eps, floor=True)
