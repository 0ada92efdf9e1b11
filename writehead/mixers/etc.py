"""ETC: a few global tokens that read everything, long tokens that read a window and the global ones, relative
labels for every pair.

Paper     Ainslie et al. 2020, "ETC: Encoding Long and Structured Inputs in Transformers", arXiv:2004.08483
Equation  score(i, j) = (q_i . k_j + q_i . a_r + b_r) D^-1/2, r = r(i, j) the label of the pair; a long query
          has one softmax over the long keys |j - i| <= radius and all global keys, a global one over all;
          among tokens of a kind r is the distance up to `clip` on either side, between kinds whether the long
          one belongs to the global one
State     none: an encoder
Cost      whole sequence O(g (g + L) + L (g + 2 radius + 1)) for g global and L long tokens
Decodes   no: global tokens read all that follows
Differs   the global tokens are the first of one sequence; without owners (`Encoder` takes them) each `span`
          long tokens in a row belong to one global token; examples are not packed into rows; both kinds share
          the stack's norms; a position scheme of the model is added to the labels, which need none (`none`)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_shape
from writehead.core.split import split
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.whole import _places, _spread

PROJECTIONS = ("pieces", "kinds", "shared")


class Labels(nn.Module):
    """What a query adds to its score with a key by the label of the pair.

    Labels 0 .. 2 clip are distances (0 itself, then keys behind it, then keys before it), the last two pairs
    of a global and a long token that do not belong to each other, and that do.
    """

    def __init__(self, heads: int, head_dim: int, clip: int) -> None:
        super().__init__()
        self.clip = clip
        self.vectors = nn.Parameter(torch.empty(heads, 2 * clip + 3, head_dim))
        self.biases = nn.Parameter(torch.zeros(heads, 2 * clip + 3))
        nn.init.normal_(self.vectors, std=head_dim**-0.5)

    def forward(self, q: Tensor) -> Tensor:
        """q (B, T, H, D) -> (B, T, H, labels)."""
        return torch.einsum("bthd,hld->bthl", q, self.vectors) + self.biases

    def distance(self, q: Tensor, k: Tensor) -> Tensor:
        """The label of each pair of tokens of a kind, from their positions."""
        after = (k - q).clamp(-self.clip, self.clip)
        return torch.where(after >= 0, after, self.clip - after)


class ETC(nn.Module):
    """Bidirectional attention of global and long tokens.

    `pos.streams["owners"]`, where it is, is (B, T) int64: the position of the global token to which each long
    token belongs (the sentence of a word), -1 = none.
    """

    reads = ("owners",)
    ordered = True

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 12,
        kv_heads: int | None = None,
        radius: int = 84,
        clip: int = 12,
        tokens: int = 64,
        span: int = 64,
        projections: str = "pieces",
        hard: bool = False,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            radius: long tokens read so many on each side.
            clip: farther away, distances have one label.
            tokens: g, how many tokens at the beginning are global.
            span: so many long tokens belong to a global one, unless owners are given.
            projections: "pieces": global and long tokens have their own, and keys and values of their own for
                readers of the other kind, as in the paper; "kinds": their own; "shared": the same.
            hard: a global token but the first reads only the long tokens that belong to it.

        Raises:
            ValueError: a size below 1 (the radius below 0), numbers of heads that do not divide, or unknown
                projections.
        """
        super().__init__()
        if radius < 0 or min(clip, tokens, span) < 1:
            raise ValueError(
                f"radius={radius}, clip={clip}, tokens={tokens}, span={span}: radius must be at least 0, the "
                "others 1"
            )
        check_choice("projections", projections, PROJECTIONS)
        self.radius, self.tokens, self.span, self.hard = radius, tokens, span, hard
        self.qkv = QKV(dim, heads, kv_heads, bias=True)
        self.out = nn.Linear(heads * self.qkv.head_dim, dim)
        shared, both = projections == "shared", 2 * self.qkv.kv_heads * self.qkv.head_dim
        self.global_qkv = self.qkv if shared else QKV(dim, heads, kv_heads, bias=True)
        self.global_out = self.out if shared else nn.Linear(heads * self.qkv.head_dim, dim)
        self.long_kv = nn.Linear(dim, both) if projections == "pieces" else None  # for global readers
        self.global_kv = nn.Linear(dim, both) if projections == "pieces" else None  # for long ones
        self.labels = Labels(heads, self.qkv.head_dim, clip)
        self.global_labels = Labels(heads, self.qkv.head_dim, clip)

    def work(self, call: Call) -> Work:
        H, D = self.qkv.heads, self.qkv.head_dim
        g = min(self.tokens, call.tokens)
        L = call.tokens - g
        m = min(self.radius, max(L - 1, 0))
        pairs = L * (2 * m + 1) - m * (m + 1) + L * g + g * call.tokens
        named = self.labels.vectors.numel()
        parts = [self.qkv, self.out, self.global_qkv, self.global_out, self.labels, self.global_labels]
        matrices = products(self.qkv, self.out)
        if self.long_kv is not None and self.global_kv is not None:
            parts += [self.long_kv, self.global_kv]
            matrices += products(self.long_kv)
        flops = call.rows * (matrices + named) + 2 * H * D * call.batch * pairs
        return Work(flops=2 * flops, weights=values(*parts))

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """Mix whole sequences.

        Args:
            x: (B, T, X).
            pos: where the tokens stand; those at positions below `tokens` are global, and need not all be
                there.

        Raises:
            ValueError: x or owners of another shape, or owners that are no global tokens.
        """
        check_shape("x", x, "B T X", B=len(pos.index), T=pos.index.shape[1], X=self.qkv.weight.shape[1])
        row, token, at, valid = pos.once(_places, pos.index)
        N, g = valid.shape[1], min(self.tokens, valid.shape[1])
        own = pos.once(_owners, pos.index, pos.streams.get("owners"), self.tokens, self.span)
        spread = _spread(x, row, token, at, N)
        own = torch.where(valid, _spread(own + 1, row, token, at, N) - 1, -1)[:, g:]
        belongs = own[..., None] == torch.arange(g, device=x.device)  # (B, L, g)
        first, rest = _heads(self.global_qkv, spread[:, :g]), _heads(self.qkv, spread[:, g:])
        lent = rest[1:] if self.long_kv is None else self._pair(self.long_kv, spread[:, g:])
        asked = self.global_out(self._global(first, lent, valid, belongs).flatten(2))
        lent = first[1:] if self.global_kv is None else self._pair(self.global_kv, spread[:, :g])
        read = self.out(self._long(rest, lent, valid, belongs).flatten(2)) if g < N else spread[:, g:]
        y = torch.cat([asked, read], 1)
        return y[torch.arange(len(y), device=y.device)[:, None], pos.index.clamp_min(0)], NOTHING

    def _pair(self, kv: nn.Linear, x: Tensor) -> "Pair":
        """Keys and values (B, T, G, D) for readers of the other kind."""
        k, v = kv(x).unflatten(2, (2, self.qkv.kv_heads, -1)).unbind(2)
        return k, v

    def _global(self, first: "Heads", lent: "Pair", valid: Tensor, belongs: Tensor) -> Tensor:
        """Global queries (B, g, H, D): one softmax over all keys, `lent` are those of long tokens."""
        q, g = first[0], first[0].shape[1]
        k, v = (torch.cat([a, b], 1) for a, b in zip(first[1:], lent, strict=True))
        named, at = self.global_labels(q), torch.arange(g, device=q.device)
        label = self.global_labels.distance(at[:, None], at).expand(len(q), -1, -1)
        label = torch.cat([label, belongs.transpose(1, 2) + named.shape[-1] - 2], 2)  # (B, g, N)
        scores = _scores(q, k) + named.gather(3, label[:, :, None].expand(-1, -1, q.shape[2], -1))
        seen = valid[:, None].expand(-1, g, -1)
        if self.hard:
            free = torch.ones(g, 1, dtype=torch.bool, device=q.device)
            free[1:] = False
            seen = seen & torch.cat([torch.ones_like(seen[..., :g]), belongs.transpose(1, 2) | free], 2)
        weights = _softmax(scores * q.shape[-1] ** -0.5, seen[:, :, None])
        return _read(weights, v)

    def _long(self, rest: "Heads", lent: "Pair", valid: Tensor, belongs: Tensor) -> Tensor:
        """Long queries (B, L, H, D): one softmax over the window and the global keys, which are `lent`;
        blocks of radius + 1 queries read three blocks of keys."""
        (q, k, v), (B, L, H, D) = rest, rest[0].shape
        g, C = lent[0].shape[1], self.radius + 1
        blocks = -(-L // C)
        more = blocks * C - L
        named = F.pad(self.labels(q), (0, 0, 0, 0, 0, more)).unflatten(1, (blocks, C))  # (B, n, C, H, labels)
        asked = F.pad(q, (0, 0, 0, 0, 0, more)).unflatten(1, (blocks, C)).flatten(0, 1)
        near = [_three(t, C, more).flatten(0, 1) for t in (k, v)]
        at, beside = torch.arange(C, device=q.device)[:, None], torch.arange(-C, 2 * C, device=q.device)
        label = self.labels.distance(at, beside)[:, None].expand(B, blocks, -1, H, -1)
        close = _scores(asked, near[0]) + named.gather(4, label).flatten(0, 1)  # (B * n, C, H, 3 C)
        there = _three(valid[:, g:, None, None], C, more)[..., 0, 0]  # (B, n, 3 C)
        window = ((beside - at).abs() <= self.radius) & there[:, :, None]
        close, window = close.unflatten(0, (B, blocks)).flatten(1, 2)[:, :L], window.flatten(1, 2)[:, :L]
        named = named.flatten(1, 2)[:, :L]
        far = _scores(q, lent[0]) + torch.where(belongs[:, :, None], named[..., -1:], named[..., -2:-1])
        seen = torch.cat([window, valid[:, None, :g].expand(-1, L, -1)], 2)
        weights = _softmax(torch.cat([close, far], 3) * D**-0.5, seen[:, :, None])
        ours = F.pad(weights[..., : 3 * C], (0, 0, 0, 0, 0, more)).unflatten(1, (blocks, C)).flatten(0, 1)
        y: Tensor = _read(ours, near[1]).unflatten(0, (B, blocks)).flatten(1, 2)[:, :L]
        return y + _read(weights[..., 3 * C :], lent[1])


Heads = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def _heads(qkv: QKV, x: Tensor) -> Heads:
    """q (B, T, H, D), k and v (B, T, G, D)."""
    both, v = qkv(x)
    q, k = split(both, (qkv.heads, qkv.kv_heads), 2)
    return q, k, v


def _three(t: Tensor, size: int, more: int) -> Tensor:
    """t (B, L, G, D) -> (B, n, 3 size, G, D): each block of `size` with those beside it."""
    padded = F.pad(t, (0, 0, 0, 0, size, more + size))
    return padded.unfold(1, 3 * size, size).movedim(-1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, T, H, D), k (B, S, G, D) -> (B, T, H, S); the heads of a group share their keys."""
    grouped = q.unflatten(2, (k.shape[2], -1))
    return torch.einsum("btgxd,bsgd->btgxs", grouped, k).flatten(2, 3)


def _read(weights: Tensor, v: Tensor) -> Tensor:
    """weights (B, T, H, S), v (B, S, G, D) -> (B, T, H, D)."""
    grouped = weights.unflatten(2, (v.shape[2], -1))
    return torch.einsum("btgxs,bsgd->btgxd", grouped, v).flatten(2, 3)


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Shares of the keys that are seen; 0 everywhere where none is."""
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen


def _owners(index: Tensor, given: Tensor | None, tokens: int, span: int) -> Tensor:
    """The position of each long token's global one, -1 = none; by default `span` long ones in a row have the
    same, those behind the last have none.

    Raises:
        ValueError: owners of another shape, that are not global, or of tokens that are.
    """
    if given is None:
        owner = (index - tokens).div(span, rounding_mode="floor")
        return torch.where((index >= tokens) & (owner < tokens), owner, -1)
    check_shape("owners", given, "B T", B=len(index), T=index.shape[1])
    if int(given.max()) >= tokens:
        raise ValueError(f"owners name position {int(given.max())}; only 0 to {tokens - 1} are global")
    if bool(((given >= 0) & (index >= 0) & (index < tokens)).any()):
        raise ValueError(f"owners are of long tokens; positions 0 to {tokens - 1} are global and want -1")
    return given
