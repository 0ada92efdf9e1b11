"""Routing attention: half of the heads read a window, the others the tokens of their own cluster.

Paper     Roy, Saffar, Vaswani, Grangier 2020, "Efficient Content-Based Sparse Attention with Routing
          Transformers", arXiv:2003.05997; its authors' code for what the paper leaves open
Equation  c(x) = argmax_c norm(x) . mu_c; y_i = softmax over S_i of norm(q_i) . norm(k_j), S_i = i and the
          last `window` tokens j < i with c(k_j) = c(q_i); mu: moving averages of their members
State     `window` keys and values for each centroid, and a window for the local heads
Cost      whole sequence O(T log T + T C D + T W D) a head; one token O((C + W) D)
Decodes   exactly, centroids fixed; mode="paper" does not: who is in a cluster depends on later tokens
Differs   the paper's centroids choose their `window` best tokens of the whole sequence (mode="paper": a token
          may be in none or several clusters); here tokens choose their nearest centroid, or, mode="running",
          centroids choose the best tokens so far, which is what the authors' decoder computes. Those two
          modes are for shared queries and keys: with keys of their own a centroid's queries and keys would
          be two lists. Local heads have the
          model's positions in place of relative tables; there is no extra matrix on the head dimension. As in
          the authors' code scores of normalised queries and keys are not scaled. kv_heads: keys of their own,
          and centroids of each write-head
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from writehead.core.bind import Of, itself
from writehead.core.cache import KV
from writehead.core.heads import QKV
from writehead.core.pattern import Window
from writehead.core.positions import Positions
from writehead.core.replay import choose, first_time
from writehead.core.shapes import check_choice, check_multiple, check_shape
from writehead.core.slots import Store
from writehead.core.work import Call, Work, products, values
from writehead.mixer import Aux
from writehead.mixers.softmax import Softmax
from writehead.ops import bucket_rings, heaps
from writehead.ops.attend import merge
from writehead.ops.bucket_rings import Asked, Rings
from writehead.ops.centroids import MOST_CLUSTERS, Centroids, norm
from writehead.ops.heaps import Heaps
from writehead.ops.top_clusters import best, within
from writehead.positions.base import Scheme

MODES = ("nearest", "running", "paper")
COMMIT = 1e-4  # the authors' weight of the commitment loss


class RoutingState(NamedTuple):
    """The local heads' window and the members of the routed heads' clusters."""

    local: KV
    members: Rings | Heaps


class Routing(nn.Module):
    """Local and routed heads side by side; their outputs add up."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        clusters: int = 16,
        window: int = 64,
        local_heads: int | None = None,
        local_window: int = 64,
        mode: str = "nearest",
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads, local and routed together.
            kv_heads: default: a routed head's keys are its queries, a local head has keys of its own; else
                how many key/value heads the local and the routed heads have each.
            head_dim: width D of a head; default dim / heads.
            clusters: centroids N of each write-head.
            window: tokens of its cluster that a token reads; about the length over the clusters.
            local_heads: those that read a window; default half.
            local_window: its tokens, the query's own included.
            mode: "nearest", "running" or "paper".
            position: the model's position scheme, of the local heads.

        Raises:
            ValueError: numbers that do not fit.
        """
        super().__init__()
        check_choice("mode", mode, MODES)
        if head_dim is None:
            check_multiple("dim", dim, "heads", heads)
        local = heads // 2 if local_heads is None else local_heads
        if not 1 <= local < heads:
            raise ValueError(f"local_heads={local} must be from 1 to {heads - 1}: both kinds are needed")
        if not 1 <= clusters <= MOST_CLUSTERS or window < 1:
            raise ValueError(
                f"clusters={clusters} must be from 1 to {MOST_CLUSTERS}, window={window} at least 1"
            )
        if mode != "nearest" and kv_heads is not None:
            raise ValueError(f'mode="{mode}" has shared queries and keys: leave kv_heads out; got {kv_heads}')
        D = head_dim or dim // heads
        self.heads, self.head_dim = heads - local, D
        self.shared, self.kv_heads = kv_heads is None, self.heads if kv_heads is None else kv_heads
        self.clusters, self.window, self.mode = clusters, window, mode
        self.local = Softmax(
            dim, heads=local, kv_heads=kv_heads, head_dim=D, pattern=Window(local_window), position=position
        )
        if self.shared:
            self.qk, self.v = (nn.Linear(dim, self.heads * D, bias=False) for _ in range(2))
        else:
            self.qkv = QKV(dim, self.heads, kv_heads, D)
        self.out = nn.Linear(self.heads * D, dim, bias=False)
        self.centroids = Centroids(self.kv_heads, clusters, D)

    def init_state(self, batch: int, like: Tensor, store: Store = Store()) -> RoutingState:
        self._check_causal()
        size = (self.kv_heads, self.clusters, self.window, self.head_dim)
        if self.mode == "running":
            members: Rings | Heaps = heaps.empty(batch, *size, store, like)
        else:
            members = bucket_rings.empty(batch, 1, *size, store, like)
        return RoutingState(self.local.init_state(batch, like, store), members)

    def state_bytes(self, batch: int, context: int, itemsize: int, store: Store = Store()) -> int:
        size = itemsize if store.dtype is None else store.dtype.itemsize
        shape = (self.kv_heads, self.clusters, self.window, self.head_dim, size)
        if self.mode == "running":
            held = heaps.heap_bytes(*shape, max(4, itemsize))
        else:
            held = bucket_rings.ring_bytes(1, *shape)
        return self.local.state_bytes(batch, context, itemsize, store) + batch * held

    def work(self, call: Call) -> Work:
        D, H, G = self.head_dim, self.heads, self.kv_heads
        parts = [self.qk, self.v, self.out] if self.shared else [self.qkv, self.out]
        routed = H if self.shared else H + G
        slot = 2 * D * call.itemsize + 16
        return self.local.work(call) + Work(
            flops=2
            * call.rows
            * (products(*parts) + routed * D * self.clusters + 2 * H * D * (self.window + 1)),
            weights=values(*parts) + self.centroids.means.numel(),
            state_read=call.rows * H * min(self.window, call.context) * slot,
            state_written=call.rows * G * slot,
        )

    def bind(self, of: Of = itself) -> Callable[..., tuple[Tensor, RoutingState | None, Aux]]:
        local, project, out = of(self.local), self._project(of), of(self.out)
        window, paper = self.window, self.mode == "paper"

        def run(
            x: Tensor, pos: Positions, state: RoutingState | None = None
        ) -> tuple[Tensor, RoutingState | None, Aux]:
            if state is not None:
                self._check_causal()
            near, kv, _ = local(x, pos, None if state is None else state.local)
            asked, means, aux = project(x, pos)
            if paper:
                return near + out(self._paper(asked, means).flatten(2)), None, aux
            members = self.init_state(len(x), x).members if state is None else state.members
            if isinstance(members, Heaps):
                y, members = self._running(asked, means, members)
                return near + out(y.flatten(2)), RoutingState(kv, members), aux
            if state is not None and x.shape[1] == 1:
                found = bucket_rings.step(asked, members, window, 1.0, False)
            else:
                found = bucket_rings.read(asked, None if state is None else members, window, 1.0, False)
            state = RoutingState(kv, bucket_rings.write(asked, members, window))
            return near + out(_with_own(*found, asked).flatten(2)), state, aux

        return run

    def forward(
        self, x: Tensor, pos: Positions, state: RoutingState | None = None
    ) -> tuple[Tensor, RoutingState | None, Aux]:
        return self.bind()(x, pos, state)

    def whole(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        """`forward` from the empty past for whoever wants no state after: training makes no rings."""
        near, _, _ = self.local(x, pos)
        asked, means, aux = self._project(itself)(x, pos)
        if self.mode == "paper":
            y = self._paper(asked, means)
        elif self.mode == "running":
            start = heaps.empty(len(x), self.kv_heads, self.clusters, self.window, self.head_dim, Store(), x)
            y, _ = self._running(asked, means, start)
        else:
            y = _with_own(*bucket_rings.read(asked, None, self.window, 1.0, False), asked)
        return near + self.out(y.flatten(2)), aux

    def _project(self, of: Of) -> Callable[[Tensor, Positions], tuple[Asked, Tensor, Aux]]:
        H, G, D, X = self.heads, self.kv_heads, self.head_dim, self.out.out_features
        centroids, shared = self.centroids, self.shared
        parts = (of(self.qk), of(self.v)) if self.shared else (of(self.qkv),)

        def run(x: Tensor, pos: Positions) -> tuple[Asked, Tensor, Aux]:
            B, T = pos.index.shape
            check_shape("x", x, "B T X", B=B, T=T, X=X)
            if shared:
                raw, v = (part(x).unflatten(-1, (H, D)) for part in parts)
                q = k = norm(raw)
            else:
                heads, v = parts[0](x)
                q, k = norm(heads).split([H, G], 2)
            means = choose(centroids.means.clone)
            sides = [(t, choose(centroids.nearest, t, means)) for t in ((q,) if shared else (q, k))]
            aux: dict[str, Tensor] = {}
            if self.training:
                aux["routing_loss"] = sum((_apart(t, at, means, pos) for t, at in sides), x.new_zeros(()))
                for t, at in sides if first_time() else ():
                    centroids.move(t.detach(), at, pos.valid)
            (_, q_cluster), (_, k_cluster) = sides[0], sides[-1]
            return Asked(q, k, v, q_cluster[..., None], k_cluster[..., None], pos.index), means, aux

        return run

    def _paper(self, asked: Asked, means: Tensor) -> Tensor:
        members = choose(self._best, asked.q, means, asked.pos)
        return within(*asked[:3], members, asked.pos, scale=1.0)

    def _running(self, asked: Asked, means: Tensor, members: Heaps) -> tuple[Tensor, Heaps]:
        score = self.centroids.score(asked.q.detach(), means)
        score = score.masked_fill((asked.pos < 0)[..., None, None], -torch.inf)
        return heaps.take(asked.q, asked.k, asked.v, score, members, scale=1.0)

    def _best(self, q: Tensor, means: Tensor, pos: Tensor) -> Tensor:
        return best(self.centroids.score(q, means), pos, self.window)

    def _check_causal(self) -> None:
        if self.mode == "paper":
            raise ValueError(
                'mode="paper" cannot decode: its clusters depend on later tokens; mode="running" and '
                '"nearest" decode with the same weights'
            )


def _apart(x: Tensor, cluster: Tensor, means: Tensor, pos: Positions) -> Tensor:
    """The commitment loss: how far real tokens x (B, T, H, D) are from their centroids, squared."""
    group = torch.arange(x.shape[2], device=x.device) // (x.shape[2] // len(means))
    away = (x - means.to(x.dtype)[group, cluster.long()]).square().mean((2, 3))
    return COMMIT * (away * pos.valid).sum() / pos.valid.sum().clamp_min(1)


def _with_own(y: Tensor, lse: Tensor, asked: Asked) -> Tensor:
    """Attention over what was found and the token itself: y (B, T, H, D)."""
    X = asked.q.shape[2] // asked.k.shape[2]
    k, v = (t if X == 1 else t.repeat_interleave(X, 2) for t in (asked.k, asked.v))
    return merge([(y, lse), (v, (asked.q * k).sum(-1).to(lse.dtype))])[0]
