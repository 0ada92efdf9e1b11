"""Head sharing: one projection to H query heads and G key/value heads, each head D wide."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.bind import Of, itself, product
from writehead.core.norm import RMS
from writehead.core.shapes import check_multiple
from writehead.core.split import split


class QKV(nn.Module):
    """Queries, keys and values in one matrix product.

    G = H is multi-head, 1 < G < H grouped-query, G = 1 multi-query attention ("one write-head"). Query head h
    reads key/value head h // (H / G).

    Attributes:
        weight: rows of all query heads, then all key heads, then all value heads: ((H + 2 G) D, X).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        """Make the projection.

        Args:
            dim: width X of the input.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D of a head; default dim / heads.
            bias: add a bias to queries, keys and values.
            norm_eps: with a number, RMS-normalise each query and key head.

        Raises:
            ValueError: the heads do not divide as needed.
        """
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        check_multiple("heads", heads, "kv_heads", self.kv_heads)
        if head_dim is None:
            check_multiple("dim", dim, "heads", heads)
        self.head_dim = head_dim or dim // heads
        rows = (heads + 2 * self.kv_heads) * self.head_dim
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        nn.init.normal_(self.weight, std=dim**-0.5)
        self.q_norm = RMS(self.head_dim, norm_eps) if norm_eps is not None else None
        self.k_norm = RMS(self.head_dim, norm_eps) if norm_eps is not None else None

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Tensor]]:
        H, G, D, weight, bias = self.heads, self.kv_heads, self.head_dim, self.weight, self.bias
        rows = (H + G) * D
        biases = (None, None) if bias is None else (bias[:rows], bias[rows:])
        project = product(of, weight, bias)
        q_norm, k_norm = (None if norm is None else of(norm) for norm in (self.q_norm, self.k_norm))

        def run(x: Tensor, infused: Tensor | None = None) -> tuple[Tensor, Tensor]:
            B, T, _ = x.shape
            if infused is None:
                heads = project(x).view(B, T, H + 2 * G, D)
                qk, v = split(heads, (H + G, G), 2)  # one gradient, where two slices make two padded ones
            else:
                qk = F.linear(infused, weight[:rows], biases[0]).view(B, T, H + G, D)
                v = F.linear(x, weight[rows:], biases[1]).view(B, T, G, D)
            if q_norm is not None and k_norm is not None:
                qk = torch.cat([q_norm(qk.narrow(2, 0, H)), k_norm(qk.narrow(2, H, G))], 2)
            return qk, v

        return run

    def forward(self, x: Tensor, infused: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project.

        Args:
            x: (B, T, X).
            infused: what queries and keys are made of where that differs from x (position-infused attention).

        Returns:
            Queries and keys side by side (B, T, H + G, D), so that one operation can rotate both, and values
            (B, T, G, D).
        """
        return self.bind()(x, infused)
