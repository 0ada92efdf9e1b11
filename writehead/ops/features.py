"""Feature maps: functions p with p(q).p(k) in place of a softmax's exp(q.k).

A map makes the features of queries and keys in one call, and may give the log of a factor on each key's
features, which `ops.scan` keeps relative to a running maximum. Random directions are buffers, saved with the
weights; they are the same in every call until `redraw` replaces them, and a version counts how often it did.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself
from writehead.core.shapes import check_choice
from writehead.ops.scan import wide

DRAWS = ("independent", "orthogonal", "regularised")


class Features(NamedTuple):
    """What a map makes.

    Attributes:
        q: (B, T, H, M).
        k: (B, T, G, M).
        gain: (B, T, G), the log of the factor on each key's features; None = 0.
    """

    q: Tensor
    k: Tensor
    gain: Tensor | None


Map: TypeAlias = Callable[[Tensor], Features]


class FeatureMap(nn.Module):
    """A map of heads side by side: queries and keys (B, T, H + G, D) to `Features`.

    Attributes:
        heads, kv_heads: H and G.
        width: features M of a head.
        rescale: does it give log gains of any size?
    """

    rescale = False

    def __init__(self, heads: int, kv_heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width

    @property
    def drawn(self) -> int:
        """How often random directions were replaced; a state made before does not fit."""
        return 0

    @property
    def products(self) -> int:
        """Multiply-adds for the features of one token."""
        return 0

    @property
    def held(self) -> int:
        """Values that a call reads: parameters and directions."""
        return 0

    def bind(self, of: Of = itself) -> Map:
        raise NotImplementedError

    def forward(self, qk: Tensor) -> Features:
        return self.bind()(qk)


class Elu(FeatureMap):
    """elu(x) + 1, elementwise: the Linear Transformer's map."""

    def bind(self, of: Of = itself) -> Map:
        H, G = self.heads, self.kv_heads

        def run(qk: Tensor) -> Features:
            made = F.elu(qk.to(wide(qk.dtype))).add_(1)  # elu keeps its input, so its output may change
            return Features(made.narrow(2, 0, H), made.narrow(2, H, G), None)

        return run


class Random(FeatureMap):
    """A map with random directions.

    Attributes:
        directions: (1 or G, R, D), for all heads or for each key/value head and its queries.
        version: how often they were redrawn.
    """

    directions: Tensor
    version: Tensor

    def __init__(
        self, heads: int, kv_heads: int, width: int, shape: tuple[int, int, int], draw: str = "orthogonal"
    ) -> None:
        """Make the map and draw its directions.

        Args:
            heads, kv_heads, width: as for every map.
            shape: of the directions.
            draw: "independent" normal directions; "orthogonal" ones in blocks of D, with the lengths of
                normal ones; "regularised": orthogonal with length D ** 0.5.

        Raises:
            ValueError: an unknown draw, or no directions.
        """
        super().__init__(heads, kv_heads, width)
        check_choice("draw", draw, DRAWS)
        if min(shape) < 1:
            raise ValueError(f"features={shape[1]} must be at least 1")
        self.draw = draw
        self.register_buffer("directions", torch.empty(shape))
        self.register_buffer("version", torch.zeros(()))  # a float, as all weights in files are
        self._fill(None)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the directions; states made before are refused from then on.

        Args:
            generator: of random numbers, on the CPU; default torch's own.
        """
        self._fill(generator)
        self.version += 1

    @property
    def drawn(self) -> int:
        return 0 if self.version.is_meta else int(self.version)

    @property
    def products(self) -> int:
        _, R, D = self.directions.shape
        return (self.heads + self.kv_heads) * R * D

    @property
    def held(self) -> int:
        return self.directions.numel()

    def _fill(self, generator: torch.Generator | None) -> None:
        if self.directions.is_meta:
            return
        sets, R, D = self.directions.shape
        drawn = torch.stack([directions(R, D, self.draw, generator) for _ in range(sets)])
        self.directions.copy_(drawn)


def directions(count: int, dim: int, draw: str, generator: torch.Generator | None = None) -> Tensor:
    """Random directions (count, dim) in float64, each normal or of a normal one's distribution.

    Orthogonal ones come in blocks of `dim`: the rows of a rotation drawn uniformly. Their signs follow the
    diagonal of R in the QR decomposition, without which the first entries would nearly all be negative and
    the features biased.
    """
    check_choice("draw", draw, DRAWS)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64, device="cpu")

    if draw == "independent":
        return normal(count)
    blocks: list[Tensor] = []
    for _ in range(0, count, dim):
        rotation, triangle = torch.linalg.qr(normal(dim))
        blocks.append((rotation * triangle.diagonal().sign()).T)
    lengths: Tensor = torch.linalg.vector_norm(normal(count), dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * (lengths if draw == "orthogonal" else float(dim) ** 0.5)


def redraw(module: nn.Module, generator: torch.Generator | None = None) -> int:
    """Replace the random directions of every feature map inside a module.

    Returns:
        How many maps there were.
    """
    maps = [part for part in module.modules() if isinstance(part, Random)]
    for part in maps:
        part.redraw(generator)
    return len(maps)


class Positive(Random):
    """FAVOR+: positive features whose product is an unbiased estimate of exp(scale q.k).

    With x' = scale ** 0.5 x the features of a key are exp(w_r.x' - |x'|^2 / 2); a query's lack what is common
    to all of them. Both are given relative to their largest; a key's largest is its log gain.
    """

    rescale = True

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        features: int,
        draw: str = "orthogonal",
        scale: float | None = None,
        hyperbolic: bool = False,
    ) -> None:
        """Make the map.

        Args:
            heads, kv_heads, head_dim: H, G, D.
            features: directions R; all heads share them.
            draw: how they are drawn (`Random`).
            scale: of the scores; default head_dim ** -0.5.
            hyperbolic: use every direction in both senses, so M = 2 R.
        """
        width = 2 * features if hyperbolic else features
        super().__init__(heads, kv_heads, width, (1, features, head_dim), draw)
        self.root = (head_dim**-0.5 if scale is None else scale) ** 0.5
        self.hyperbolic = hyperbolic

    def bind(self, of: Of = itself) -> Map:
        H, G, root, W, both = self.heads, self.kv_heads, self.root, self.directions, self.hyperbolic

        def run(qk: Tensor) -> Features:
            x = qk.to(wide(qk.dtype)) * root
            p = F.linear(x, W[0].to(x.dtype))
            p = torch.cat([p, -p], -1) if both else p
            top = p.detach().amax(-1, keepdim=True)
            made = p.sub_(top).exp_()
            k = x.narrow(2, H, G)
            gain = top.narrow(2, H, G).squeeze(-1) - k.square().sum(-1) / 2
            return Features(made.narrow(2, 0, H), made.narrow(2, H, G), gain)

        return run


class Relu(Random):
    """Generalised attention: relu(w_r.x') + 0.001 with x' = scale ** 0.5 x."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        features: int | None,
        draw: str = "orthogonal",
        scale: float | None = None,
    ) -> None:
        """Make the map.

        Args:
            heads, kv_heads, head_dim: H, G, D.
            features: directions M; None = no projection, M = D.
            draw: how they are drawn (`Random`).
            scale: as in `Positive`; default head_dim ** -0.5.
        """
        super().__init__(heads, kv_heads, features or head_dim, (1, features or 1, head_dim), draw)
        self.root = (head_dim**-0.5 if scale is None else scale) ** 0.5
        self.projects = features is not None

    @property
    def products(self) -> int:
        return super().products if self.projects else 0

    @property
    def held(self) -> int:
        return super().held if self.projects else 0

    def bind(self, of: Of = itself) -> Map:
        H, G, root, W, projects = self.heads, self.kv_heads, self.root, self.directions, self.projects

        def run(qk: Tensor) -> Features:
            x = qk.to(wide(qk.dtype)) * root
            p = F.linear(x, W[0].to(x.dtype)) if projects else x
            made = p.relu() + 1e-3
            return Features(made.narrow(2, 0, H), made.narrow(2, H, G), None)

        return run


class Unit(Random):
    """Features of vectors of length 1, for Random Feature Attention.

    Directions are w_r = sigma * e_r with a learned sigma for each key/value head. Gaussian features
    R^-1/2 [sin w_r.x, cos w_r.x] estimate exp(-|sigma (q - k)|^2 / 2); arc-cosine: R^-1/2 relu(w_r.x).
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, features: int, draw: str, kernel: str
    ) -> None:
        """Make the map.

        Args:
            heads, kv_heads, head_dim: H, G, D.
            features: directions R, drawn for each key/value head.
            draw: how (`Random`).
            kernel: "gaussian" (M = 2 R) or "arccos" (M = R).

        Raises:
            ValueError: an unknown kernel or draw.
        """
        check_choice("kernel", kernel, ("gaussian", "arccos"))
        width = 2 * features if kernel == "gaussian" else features
        super().__init__(heads, kv_heads, width, (kv_heads, features, head_dim), draw)
        self.sigma = nn.Parameter(torch.ones(kv_heads, 1, head_dim))
        self.kernel = kernel

    @property
    def held(self) -> int:
        return super().held + self.sigma.numel()

    def bind(self, of: Of = itself) -> Map:
        H, G, sigma, gaussian = self.heads, self.kv_heads, self.sigma, self.kernel == "gaussian"
        base = self.directions

        def run(qk: Tensor) -> Features:
            x = F.normalize(qk.to(wide(qk.dtype)), dim=-1)
            W = (base * sigma).to(x.dtype)
            q, k = x.narrow(2, 0, H).unflatten(2, (G, -1)), x.narrow(2, H, G).unsqueeze(3)
            p = torch.einsum("btghd,grd->btghr", torch.cat([q, k], 3), W)
            made = torch.cat([p.sin(), p.cos()], -1) if gaussian else p.relu()
            made = made * W.shape[1] ** -0.5
            X = H // G
            return Features(made.narrow(3, 0, X).flatten(2, 3), made.narrow(3, X, 1).squeeze(3), None)

        return run
