"""Attention through feature maps as running sums: one function of (state, chunk).

With features p(q), p(k) in place of the softmax, causal attention is a recurrence over tokens,

    S_t = f_t S_{t-1} + g_t p(k_t) [v_t, 1]^T        y_t = p(q_t) S_t, its last column the denominator's sum

Many tokens go over it in chunks: within one the scores are a small matrix, between chunks only S passes.
One token is one step. Factors f (decay) and g (gain) are given as logarithms. A state with a running maximum
keeps S relative to exp(top), where top is the largest log gain met so far; that cancels between numerator and
denominator, so gains of any size never overflow. Each token is weighed by the maximum at that token, never by
a later one, so results do not depend on how a sequence is cut and earlier tokens know nothing of later ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from writehead.core.shapes import check_multiple, check_shape
from writehead.ops.scan_chunks import Rule, as_given, chunks

NOTHING = -1e30  # the log of a gain that is none; finite, so that differences stay numbers
CHUNK = 128


class Sums(NamedTuple):
    """What is known of the past.

    Attributes:
        s: (B, G, M, E + 1), sums of features times values; the last column sums the features alone.
        top: (B, G), the log of the factor that s must be multiplied by; None = 0.
    """

    s: Tensor
    top: Tensor | None


def empty(
    batch: int, kv_heads: int, features: int, head_dim: int, like: Tensor, rescale: bool = False
) -> Sums:
    """The sums of no tokens, in float32 or wider.

    Args:
        batch: rows B.
        kv_heads: key/value heads G.
        features: width M of a feature vector.
        head_dim: width E of a value.
        like: a tensor of the computation's type and device.
        rescale: keep a running maximum.
    """
    dtype = wide(like.dtype)
    s = like.new_zeros(batch, kv_heads, features, head_dim + 1, dtype=dtype)
    return Sums(s, like.new_full((batch, kv_heads), NOTHING, dtype=dtype) if rescale else None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums for values of a type: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sums,
    rule: Rule,
    *,
    decay: Tensor | None = None,
    gain: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Sums]:
    """Read each query against the past and the keys of this call up to its own.

    Args:
        q: features of the queries (B, T, H, M).
        k: features of the keys (B, T, G, M), G a divisor of H; a key of zeros is not remembered.
        v: values (B, T, G, E).
        state: the past; without autograd one token is added in place.
        rule: of the denominator.
        decay: (B, T, G), the log of the factor on all earlier tokens; at most 0.
        gain: (B, T, G), the log of the factor on the key; of any size if the state keeps a running maximum.
        chunk: tokens that are scored against each other at once; a matter of speed, not of the result.

    Returns:
        y (B, T, H, E) in v's type, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, or a running maximum without gains.
    """
    (B, T, H, M), (G, E) = q.shape, v.shape[2:]
    if k.shape != (B, T, G, M) or v.shape != (B, T, G, E) or state.s.shape != (B, G, M, E + 1) or H % G:
        check_shape("k", k, "B T G M", B=B, T=T, M=M)
        check_shape("v", v, "B T G E", B=B, T=T, G=k.shape[2])
        check_multiple("heads", H, "kv_heads", G)
        check_shape("state.s", state.s, "B G M E+1", **{"B": B, "G": G, "M": M, "E+1": E + 1})
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if state.top is not None and gain is None:
        raise ValueError("a state with a running maximum needs the log gains of the keys; got gain=None")
    dtype, out = state.s.dtype, v.dtype
    q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))
    tops = None if state.top is None or gain is None else _tops(state.top, decay, gain.detach())
    learned = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, state.s, decay, gain)
    )
    with as_given(q):
        if T == 1 and not learned:
            y, s = _step(q, k, v, state, tops, rule, decay, gain)
        else:
            y, s = chunks(q, k, v, state.s, decay, gain, state.top, tops, rule, chunk)
    return (y if out == dtype else y.to(out)), Sums(s, None if tops is None else tops[:, -1])


def whole(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Read each query against all keys: the bidirectional form.

    Args:
        q, k, v: features and values as `scan` takes them; log gains are already in k.
        rule: of the denominator.

    Returns:
        y (B, T, H, E) in v's type.
    """
    (B, T, H, M), (G, E) = q.shape, v.shape[2:]
    dtype, out = wide(v.dtype), v.dtype
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    s = k.transpose(-1, -2) @ v
    z = k.sum(2)[..., None]
    rows = q.reshape(B, G, -1, M)
    y = (rows @ s) / rule.denominator(rows @ z)
    return y.view(B, H, T, E).transpose(1, 2).to(out)


def _tops(top: Tensor, decay: Tensor | None, gain: Tensor) -> Tensor:
    """(B, T, G), the running maximum of the log gains, each lessened by the decays since."""
    if decay is None:
        return torch.maximum(gain.cummax(1).values, top[:, None])
    past = decay.detach().cumsum(1)
    return past + torch.maximum((gain - past).cummax(1).values, top[:, None])


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sums,
    tops: Tensor | None,
    rule: Rule,
    decay: Tensor | None,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token, the state written in place."""
    s, (B, _, H, M), (G, E) = state.s, q.shape, v.shape[2:]
    added = s.new_empty(B, G, 1, E + 1)
    added[..., :E] = v.view(B, G, 1, E)
    added[..., E] = 1
    log_carry, log_gain = (None if t is None else t[:, 0] for t in (decay, gain))
    if tops is not None and state.top is not None and log_gain is not None:
        after = tops[:, 0]
        log_carry = state.top - after if log_carry is None else state.top + log_carry - after
        log_gain = log_gain - after
    if log_gain is not None:
        added *= log_gain.exp()[..., None, None]
    if log_carry is not None:
        s *= log_carry.exp()[..., None, None]
    held = s.view(B * G, M, E + 1)
    torch.baddbmm(held, k.reshape(B * G, M, 1), added.view(B * G, 1, E + 1), out=held)
    y = torch.bmm(q.reshape(B * G, H // G, M), held).view(B, 1, H, E + 1)
    return y[..., :E] / rule.denominator(y[..., E:]), s
