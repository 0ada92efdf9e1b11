"""Softmax attention, the one implementation: queries against keys and values whose heads are never expanded.

Every call gives (y, lse). The log-sum-exp lets disjoint sets of keys be merged exactly (`merge`), which is
how keys are split over threads and how caches are read block by block. A query that may read nothing has y =
0, lse = -inf.

Few queries of a group share a key/value head by becoming rows of its matrix product: X = H / G rows for each
new token instead of X readings (or copies) of the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from writehead.core.shapes import check_multiple, check_shape

FOLD = (
    64  # up to so many rows the queries of a group become one product; beyond, the kernel shares keys itself
)
PIECE = 2048  # keys of one piece where a single token's keys are cut up
LONG, MANY = (
    4096,
    12,
)  # from so many keys and rows a key/value head pieces beat the fused kernel (docs/log.md)
flash = torch._scaled_dot_product_flash_attention_for_cpu


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v, over the keys that the mask lets through.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D) and (B, S, G, E), G a divisor of H.
        mask: bool, broadcasts to (B, H, T, S), True = may read.
        bias: broadcasts to (B, H, T, S), added to the scaled scores.
        causal: query t reads keys up to S - T + t; needs S >= T.
        scale: default D ** -0.5.
        exact: take the plain path, whose lse has a gradient; the fused one gives lse without.

    Returns:
        y (B, T, H, E) in q's type, and lse (B, T, H).

    Raises:
        ValueError: shapes that do not fit.
    """
    B, T, H, D = q.shape
    _, S, G, E = k.shape[:3] + v.shape[-1:]
    if k.shape != (B, S, G, D) or v.shape != (B, S, G, E) or H % G:
        check_shape("k", k, "B S G D", B=B, D=D)
        check_shape("v", v, "B S G E", B=B, S=S, G=G)
        check_multiple("heads", H, "kv_heads", G)
    if causal and S < T:
        raise ValueError(f"causal attention needs at least as many keys as queries; got T={T}, S={S}")
    scale = D**-0.5 if scale is None else scale
    if S == 0:
        return q.new_zeros(B, T, H, E), q.new_full((B, T, H), -torch.inf)
    plain = exact or E != D or not q.is_cpu or (bias is not None and bias.requires_grad)
    if plain:
        return _exact(q, k, v, _additive(mask, bias, causal, q, S), scale)
    if T == 1 and S >= LONG and H // G >= MANY and mask is None and bias is None and not _graph(q, k, v):
        return _pieces(q, k, v, scale)
    if T == 1 or T < H // G * T <= FOLD:
        return _folded(q, k, v, _additive(mask, bias, causal, q, S), scale)
    causal_only = causal and mask is None and bias is None
    if causal_only and T < S and not _graph(q, k, v):
        past, new = slice(0, S - T), slice(S - T, S)
        parts = (
            attend(q, k[:, past], v[:, past], scale=scale),
            attend(q, k[:, new], v[:, new], causal=True, scale=scale),
        )
        return merge(parts)
    triangle = causal_only and T == S
    added = None if triangle else _additive(mask, bias, causal, q, S)
    y, lse = _flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), added, triangle, scale)
    return y.transpose(1, 2), lse.transpose(1, 2)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from the (y, lse) of each.

    Raises:
        ValueError: gradients are wanted, but a part's lse carries none (`attend(..., exact=True)` does).
    """
    if torch.is_grad_enabled() and any(y.requires_grad and not lse.requires_grad for y, lse in parts):
        raise ValueError("merging under autograd needs an lse with a gradient: call attend(..., exact=True)")
    weights, lse = _softmax(torch.stack([lse for _, lse in parts]), 0)
    y = sum(w[..., None] * part for w, (part, _) in zip(weights.to(parts[0][0].dtype), parts, strict=True))
    assert isinstance(y, Tensor)
    return y, lse


def _additive(mask: Tensor | None, bias: Tensor | None, causal: bool, q: Tensor, S: int) -> Tensor | None:
    """Everything that is added to the scores, (B or 1, H or 1, T, S), -inf where nothing may be read."""
    if causal:
        T = q.shape[1]
        own = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = own[None, None] if mask is None else mask & own
    if mask is None:
        return None if bias is None else bias.to(q.dtype)
    base = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
    return torch.where(mask, base, -torch.inf)


def _softmax(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp; 0, -inf and no gradient where every score is -inf (torch's give NaN)."""
    top = scores.detach().amax(dim, keepdim=True)
    shares = torch.exp(scores - top.masked_fill(top == -torch.inf, 0))
    total = shares.sum(dim, keepdim=True).masked_fill(top == -torch.inf, 1)
    return shares / total, (total.log() + top).squeeze(dim)


def _exact(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    (B, T, H, D), G = q.shape, k.shape[2]
    rows = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).reshape(B, G, -1, D)
    scores = (rows @ k.permute(0, 2, 3, 1)).reshape(B, H, T, -1) * scale
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide) if added is None else scores.to(wide) + added.to(wide)
    weights, lse = _softmax(scores, -1)
    y = weights.to(v.dtype).reshape(B, G, -1, weights.shape[-1]) @ v.transpose(1, 2)
    return y.reshape(B, H, T, -1).transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def _graph(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _pieces(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token's many query rows against the keys of each head in pieces, which threads share; no graph."""
    (B, _, H, D), S, G = q.shape, *k.shape[1:3]
    rows, found = (q * scale).view(B, G, H // G, D), []
    size = S // (S // PIECE)
    whole = S - S % size
    for b in range(B):
        for g in range(G):
            head = [(k[b, :whole, g].unflatten(0, (-1, size)), v[b, :whole, g].unflatten(0, (-1, size)))]
            if whole < S:
                head.append((k[b, None, whole:, g], v[b, None, whole:, g]))
            parts = [_piece(rows[b, g], *part) for part in head]
            y, lse = (torch.cat(t) if len(t) > 1 else t[0] for t in zip(*parts, strict=True))
            shares, total = _softmax(lse, 0)
            found.append(((shares.to(y.dtype)[..., None] * y).sum(0), total))
    y, lse = (torch.stack(t) for t in zip(*found, strict=True))
    return y.view(B, 1, H, D), lse.view(B, 1, H)


def _piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (R, D), k and v (pieces, S, D): y (pieces, R, D) and lse (pieces, R)."""
    scores = torch.bmm(q.expand(len(k), *q.shape), k.transpose(1, 2))
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    top = wide.amax(-1, keepdim=True)
    shares = wide.sub_(top).exp_()
    total = shares.sum(-1, keepdim=True)
    y = torch.bmm(shares.to(v.dtype), v).div_(total)
    return y, (total.log_() + top).squeeze(-1)


def _folded(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """All queries that share a key/value head as the rows of one product."""
    (B, T, H, D), S, G = q.shape, *k.shape[1:3]
    X = H // G
    if T == 1:
        if added is not None and added.shape[1] > 1:
            added = added.reshape(-1, G, X, S)
        y, lse = _flash(q.view(B, G, X, D), k.transpose(1, 2), v.transpose(1, 2), added, False, scale)
        return y.reshape(B, 1, H, D), lse.reshape(B, 1, H)
    rows = q.unflatten(2, (G, X)).permute(0, 2, 3, 1, 4).reshape(B, G, X * T, D)
    if added is not None:
        R, A = added.shape[:2]
        added = added.unflatten(1, (G, X)) if A == H else added[:, :, None].expand(R, A, X, T, S)
        added = added.expand(-1, -1, X, T, S).reshape(R, -1, X * T, S)
    y, lse = _flash(rows, k.transpose(1, 2), v.transpose(1, 2), added, False, scale)
    return (
        y.reshape(B, G, X, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D),
        lse.reshape(B, G, X, T).permute(0, 3, 1, 2).reshape(B, T, H),
    )


def _flash(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU kernel, (B, heads, rows, D), with the lse of an empty row set right (it gives
    0)."""
    y, lse = flash(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    if added is not None:
        lse = lse.masked_fill((added == -torch.inf).all(-1), -torch.inf)
    return y, lse
