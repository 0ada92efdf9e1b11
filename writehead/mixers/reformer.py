"""LSH attention: each token reads the latest tokens whose queries point its way.

Paper     Kitaev, Kaiser, Levskaya 2020, "Reformer: The Efficient Transformer", arXiv:2001.04451; its authors'
          Trax code for what the paper leaves open
Equation  h_r(x) = argmax [x R_r ; -x R_r]; y_i = softmax over S_i of q_i . q_j / |q_j|, S_i = the union over
          rounds r of the last `window` tokens j < i with h_r(q_j) = h_r(q_i), or {i} if that is empty
State     for each round, head and bucket a ring of `window` keys and values; constant in the context
Cost      whole sequence O(R T log T + R T W D) a head; one token O(R W D)
Decodes   exactly; mode="paper" does not: whom its chunks let a token read depends on later tokens
Differs   the paper's chunks of sorted tokens let a token read from `window` to 2 `window` - 1 of its bucket,
          and others at the chunks' borders; here it is exactly `window` of its bucket, and the number of
          buckets is fixed, so that a prefix's result does not change when it grows. Rounds count a key once
          (the paper) or, mode="multiset", once for each round that finds it (Trax). With kv_heads keys are
          not the queries: heads of a group share rotations and keys, and scores are scaled by D^-1/2.
          mode="paper" has no multi-query form, since each of its query heads is its own key head
"""

from collections.abc import Callable
from math import prod, sqrt

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.replay import choose
from writehead.core.shapes import check_choice, check_multiple, check_shape
from writehead.core.slots import Store
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops import bucket_rings
from writehead.ops.bucket_rings import Asked, Rings
from writehead.ops.buckets import bucket_attention, runs
from writehead.ops.look_back import look_back
from writehead.positions.base import NoPosition, Scheme, has

MODES = ("set", "multiset", "paper")
HASHED = 1 << 22  # projections held while tokens are hashed
MOST_VALUES = 1 << 28  # of all rotations of a layer: one gigabyte
MOST_BUCKETS = 1 << 15  # numbers of buckets are kept in 16 bits


class Hashes(nn.Module):
    """Random rotations: a saved buffer, drawn once.

    Attributes:
        rotations: (G, D, R, half the sum of the factors), as in transformers' Reformer.
    """

    def __init__(self, kv_heads: int, head_dim: int, buckets: int | list[int], rounds: int) -> None:
        super().__init__()
        self.factors = [buckets] if isinstance(buckets, int) else list(buckets)
        for factor in self.factors:
            check_multiple("buckets", factor, "half-spaces", 2)
        self.buckets = prod(self.factors)
        if not self.factors or self.buckets > MOST_BUCKETS:
            raise ValueError(f"buckets={buckets} make {self.buckets} in all; at most {MOST_BUCKETS} are kept")
        if rounds < 1:
            raise ValueError(f"rounds={rounds} must be at least 1")
        shape = (kv_heads, head_dim, rounds, sum(self.factors) // 2)
        if prod(shape) > MOST_VALUES:
            raise ValueError(
                f"rounds={rounds} of {sum(self.factors)} buckets need {prod(shape)} random values; at most "
                f"{MOST_VALUES} are kept: give buckets as several factors"
            )
        self.rotations: Tensor
        self.register_buffer("rotations", torch.randn(shape))

    def draw(self, seed: int) -> None:
        """Draw the rotations anew, as transformers' Reformer does from its hash_seed."""
        generator = torch.Generator().manual_seed(seed)
        self.rotations.copy_(torch.randn(self.rotations.shape, generator=generator))

    def forward(self, x: Tensor, rounds: int) -> Tensor:
        """x (B, T, H, D) -> buckets (B, T, H, rounds), H a multiple of the key/value heads."""
        G = len(self.rotations)
        turned = self.rotations[:, :, :rounds].to(x.dtype).flatten(2)
        found = torch.empty(*x.shape[:3], rounds, dtype=torch.int16, device=x.device)
        step = max(1, HASHED // (len(x) * x.shape[2] * turned.shape[-1]))
        for piece, into in zip(x.split(step, 1), found.split(step, 1), strict=True):
            heads = piece.unflatten(2, (G, -1))
            p = torch.einsum("btgxd,gdm->btgxm", heads, turned).unflatten(-1, (rounds, -1)).flatten(2, 3)
            into.copy_(self._number(p))
        return found

    def _number(self, p: Tensor) -> Tensor:
        number, base = torch.zeros(p.shape[:-1], dtype=torch.int64, device=p.device), 1
        for factor, part in zip(self.factors, p.split([f // 2 for f in self.factors], -1), strict=True):
            number += base * torch.cat([part, -part], -1).argmax(-1)
            base *= factor
        return number


class LSH(nn.Module):
    """Self-attention within buckets of similar directions."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        buckets: int | list[int] = 32,
        rounds: int = 2,
        eval_rounds: int | None = None,
        window: int = 64,
        mode: str = "set",
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: default: a head's keys are its queries (shared QK); a divisor G of H: keys of their own,
                shared by H / G query heads.
            head_dim: width D of a head; default dim / heads.
            buckets: how many, even; about twice the length over the window. Several even factors of a large
                number make hashing cheaper.
            rounds: independent hashes.
            eval_rounds: their number outside of training; default the same.
            window: keys of its bucket that a token reads in a round; with mode="paper" the length of a chunk.
            mode: "set", "multiset" or "paper".
            position: the model's position scheme; buckets are found before keys are turned.

        Raises:
            ValueError: numbers that do not fit, or a position scheme that adds to the scores.
        """
        super().__init__()
        check_choice("mode", mode, MODES)
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        if head_dim is None:
            check_multiple("dim", dim, "heads", heads)
        self.position = NoPosition() if position is None else position
        if has(self.position, "bias"):
            raise ValueError(
                "LSH attention adds no bias to scores; use rotary, sinusoidal, learned or axial positions"
            )
        if mode == "paper" and kv_heads is not None:
            raise ValueError(f'mode="paper" has shared queries and keys: leave kv_heads out; got {kv_heads}')
        self.heads, self.head_dim = heads, head_dim or dim // heads
        self.shared, self.kv_heads = kv_heads is None, heads if kv_heads is None else kv_heads
        self.rounds, self.eval_rounds = rounds, rounds if eval_rounds is None else eval_rounds
        self.window, self.mode = window, mode
        width = heads * self.head_dim
        if self.shared:
            self.qk, self.v = (nn.Linear(dim, width, bias=False) for _ in range(2))
        else:
            self.qkv = QKV(dim, heads, kv_heads, self.head_dim)
        self.out = nn.Linear(width, dim, bias=False)
        self.hashes = Hashes(self.kv_heads, self.head_dim, buckets, max(self.rounds, self.eval_rounds))
        self.scale = 1.0 if self.shared else self.head_dim**-0.5

    @property
    def active(self) -> int:
        """Rounds in the present mode, training or evaluation."""
        return self.rounds if self.training else self.eval_rounds

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> Rings:
        self._check_causal()
        size = (self.active, self.kv_heads, self.hashes.buckets, self.window, self.head_dim)
        return bucket_rings.empty(batch, *size, store, like)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        size = itemsize if store.dtype is None else store.dtype.itemsize
        shape = (self.active, self.kv_heads, self.hashes.buckets, self.window, self.head_dim)
        return batch * bucket_rings.ring_bytes(*shape, size)

    def work(self, call: Call) -> Work:
        D, R, H, G = self.head_dim, self.active, self.heads, self.kv_heads
        projections = [self.qk, self.v, self.out] if self.shared else [self.qkv, self.out]
        hashed = H if self.shared else H + G
        hashing = hashed * D * R * self.hashes.rotations.shape[-1]
        slot = 2 * D * call.itemsize + 8 * (1 + R)
        return Work(
            flops=2 * call.rows * (products(*projections) + hashing + 2 * H * D * R * self.window),
            weights=values(*projections) + self.hashes.rotations[:, :, :R].numel(),
            state_read=call.rows * R * H * min(self.window, call.context) * slot,
            state_written=call.rows * R * G * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, Rings | None, Aux]]:
        project, out, mode, window, scale = (
            self._project(of),
            of(self.out),
            self.mode,
            self.window,
            self.scale,
        )

        def run(x: Tensor, pos: Positions, state: Rings | None = None) -> tuple[Tensor, Rings | None, Aux]:
            if state is not None:
                self._check_causal()
            asked = project(x, pos, self.active if state is None else state.k.shape[1])
            if mode == "paper":
                return out(self._paper(asked, causal=True).flatten(2)), None, NOTHING
            once = mode == "set"
            if state is not None and x.shape[1] == 1:
                y, lse = bucket_rings.step(asked, state, window, scale, once)
            else:
                y, lse = bucket_rings.read(asked, state, window, scale, once)
            if state is None:
                state = self.init_state(len(x), x)
            return out(_or_own(y, lse, asked.v).flatten(2)), bucket_rings.write(asked, state, window), NOTHING

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: Rings | None = None
    ) -> tuple[Tensor, Rings | None, Aux]:
        return self.bind()(x, pos, state)

    def whole(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """`forward` from the empty past for whoever wants no state after: training makes no rings."""
        asked = self._project(itself)(x, pos, self.active)
        if self.mode == "paper":
            return self.out(self._paper(asked, causal=True).flatten(2)), NOTHING
        y, lse = bucket_rings.read(asked, None, self.window, self.scale, self.mode == "set")
        return self.out(_or_own(y, lse, asked.v).flatten(2)), NOTHING

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """Every token reads `window` tokens of its bucket on each side; mode="paper": two chunks."""
        asked = self._project(itself)(x, pos, self.active)
        if self.mode == "paper":
            return self.out(self._paper(asked, causal=False).flatten(2)), NOTHING
        k_pos = asked.pos[..., None].expand(-1, -1, self.kv_heads)
        found = [
            run
            for r in range(self.active)
            for run in runs(
                asked.q_bucket[..., r], asked.k_bucket[..., r], asked.pos, k_pos, self.window, both_sides=True
            )
        ]
        y, lse = bucket_attention(
            *asked[:3], found, k_pos, window=self.window, scale=self.scale, once=self.mode == "set"
        )
        return self.out(_or_own(y, lse, asked.v).flatten(2)), NOTHING

    def _project(self, of: Of) -> Callable[[Tensor, Positions, int], Asked]:
        H, G, D, X = self.heads, self.kv_heads, self.head_dim, self.out.out_features
        hashes, scheme = self.hashes, self.position
        turns, infuses = has(scheme, "rotate"), has(scheme, "infuse")
        parts = (of(self.qk), of(self.v)) if self.shared else (of(self.qkv),)

        def run(x: Tensor, pos: Positions, rounds: int) -> Asked:
            B, T = pos.index.shape
            if x.shape != (B, T, X):
                check_shape("x", x, "B T X", B=B, T=T, X=X)
            scheme.check_context(pos)
            infused = scheme.infuse(x, pos) if infuses else None
            if len(parts) == 2:
                raw = parts[0](x if infused is None else infused).unflatten(-1, (H, D))
                v, k = parts[1](x).unflatten(-1, (H, D)), unit(raw)
                q_bucket = k_bucket = choose(hashes, raw, rounds)
                q = raw
            else:
                raw, v = parts[0](x, infused)
                q, k = raw.split([H, G], 2)
                q_bucket, k_bucket = choose(hashes, q, rounds), choose(hashes, k, rounds)
            if turns:
                q, k = scheme.rotate(torch.cat([q, k], 2), pos).split([H, G], 2)
            return Asked(q, k, v, q_bucket, k_bucket, pos.index)

        return run

    def _paper(self, asked: Asked, causal: bool) -> Tensor:
        """The paper's chunks, as in Trax and transformers; short sequences are read whole."""
        y, lse = look_back(
            *asked[:4], asked.pos, buckets=self.hashes.buckets, chunk=self.window, causal=causal
        )
        return _or_own(y, lse, asked.v)

    def _check_causal(self) -> None:
        if self.mode == "paper":
            raise ValueError(
                'mode="paper" cannot decode: its chunks depend on later tokens; mode="set" or "multiset" '
                "decodes with the same weights"
            )


def unit(q: Tensor) -> Tensor:
    """Queries (..., D) as keys: of length one, with Trax' epsilon."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    length = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * sqrt(q.shape[-1])
    return (wide / length).to(q.dtype)


def _or_own(y: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    """y (B, T, H, D), and where a token found nothing, its own value."""
    own = v if v.shape[2] == y.shape[2] else v.repeat_interleave(y.shape[2] // v.shape[2], 2)
    return torch.where((lse == -torch.inf)[..., None], own, y)
