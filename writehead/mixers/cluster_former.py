"""Cluster-Former: tokens sorted by the cluster of their hidden state, then read in overlapping windows.

Paper     Wang et al. 2020, "Cluster-Former: Clustering-based Sparse Transformer for Long-Range Dependency
          Encoding", arXiv:2009.06097
Equation  c(t) = argmax_c x_t . mu_c; tokens in order of (c(t), t) are cut into windows of `window` every
          `stride`; y_t = mean over the windows that hold t of softmax(q_t . k / sqrt(D)) v over the window
State     none: encoders only
Cost      O(T W / S W D + T C X), S = stride
Decodes   not at all: which window holds a token depends on later tokens
Differs   means of the attention's outputs are taken, the paper's of whole layers' outputs. What the paper
          leaves open: the memory keeps 8192 states, the newest in place of the oldest; k-means has 10
          iterations; of equally near centroids the first counts; one that lost its members stays. Centroids
          are made anew after every `refit` training calls, where the paper counts epochs. kv_heads: one
          assignment serves all heads, so those that share keys read the same windows
"""

import torch
from torch import Tensor, nn

from writehead.core.bind import itself
from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.processes import rows_of_all
from writehead.core.replay import choose, first_time
from writehead.core.shapes import check_shape
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.attend import attend
from writehead.positions.base import NoPosition, Scheme, has

MEMORY, ITERATIONS = 8192, 10
BASE = 128  # of the digits in which counts are kept


class ClusterFormer(nn.Module):
    """Bidirectional attention within windows of the sorted sequence; one cluster is a sliding window.

    Attributes:
        means: (C, X), one assignment for all heads.
        memory: (MEMORY, X), the hidden states that the means are made of.
        together: does the memory hold the states of all processes that train the model?
        seen: (2, 3), training calls since k-means, and states written, in digits that any float type holds.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        clusters: int = 64,
        window: int = 256,
        stride: int | None = None,
        question: int = 0,
        refit: int = 1000,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D of a head; default dim / heads.
            clusters: C; 1 gives the paper's other kind of layer, windows of the sequence as it stands.
            window: tokens W of a window.
            stride: from one window to the next; default 7/8 of the window.
            question: the first so many tokens are part of every window.
            refit: training calls from one k-means to the next.
            position: the model's position scheme.

        Raises:
            ValueError: numbers that do not fit, or a position scheme that adds to the scores.
        """
        super().__init__()
        stride = max(1, window * 7 // 8) if stride is None else stride
        if min(clusters, window, refit) < 1 or question < 0:
            raise ValueError(
                f"clusters={clusters}, window={window} and refit={refit} must be at least 1, "
                f"question={question} at least 0"
            )
        if refit >= BASE**3:
            raise ValueError(f"refit={refit} must be below {BASE**3}")
        if not 1 <= stride <= window:
            raise ValueError(f"stride={stride} must be from 1 to window={window}, or tokens are left out")
        self.position = NoPosition() if position is None else position
        if has(self.position, "bias"):
            raise ValueError(
                "Cluster-Former adds no bias to scores; use rotary, sinusoidal or learned positions"
            )
        self.qkv = QKV(dim, heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim = heads, self.qkv.kv_heads, self.qkv.head_dim
        self.window, self.stride, self.question, self.refit = window, stride, question, refit
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.together = False
        self.means: Tensor
        self.memory: Tensor
        self.seen: Tensor
        self.register_buffer("means", torch.randn(clusters, dim))
        self.register_buffer("memory", torch.zeros(MEMORY if clusters > 1 else 0, dim))
        self.register_buffer("seen", torch.zeros(2, 3))

    def work(self, call: Call) -> Work:
        D, W = self.head_dim, self.window + self.question
        reads = 2 * self.heads * D * W * W * call.batch * (-(-call.tokens // self.stride))
        rows = products(self.qkv, self.out) + self.means.numel()
        return Work(
            flops=2 * (call.rows * rows + reads), weights=values(self.qkv, self.out) + self.means.numel()
        )

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        (B, T), H, G = pos.index.shape, self.heads, self.kv_heads
        check_shape("x", x, "B T X", B=B, T=T, X=self.out.out_features)
        self.position.check_context(pos)
        infused = self.position.infuse(x, pos) if has(self.position, "infuse") else None
        qk, v = itself(self.qkv)(x, infused)
        q, k = self.position.rotate(qk, pos).split([H, G], 2)
        at = choose(self._windows, x, pos.index)  # (B, n, W), -1 = none
        n, W = at.shape[1:]
        row, token = torch.arange(B, device=x.device)[:, None, None], at.clamp_min(0)
        parts = (t[row, token].flatten(0, 1) for t in (q, k, v))
        there = (at >= 0).flatten(0, 1)
        y, _ = attend(*parts, mask=there[:, None, None])
        y = (y * there[..., None, None]).reshape(B, n * W, H, self.head_dim)
        index = token.flatten(1)[..., None, None].expand_as(y)
        total = torch.zeros_like(q).scatter_add(1, index, y)
        count = x.new_zeros(B, T).scatter_add(1, token.flatten(1), (at >= 0).flatten(1).to(x.dtype))
        if self.training and first_time():
            self._remember(x.detach()[pos.valid])
        return self.out((total / count.clamp_min(1)[..., None, None]).flatten(2)), NOTHING

    def _windows(self, x: Tensor, index: Tensor) -> Tensor:
        """The tokens of each window, (B, n, question + W); -1 = none."""
        B, T = index.shape
        asked = (index >= 0) & (index < self.question)
        cluster = self._nearest(x) if len(self.means) > 1 else torch.zeros_like(index)
        last = len(self.means)
        cluster = torch.where((index < 0) | asked, last, cluster)
        order = index.argsort(dim=1, stable=True)
        order = order.gather(1, cluster.gather(1, order).argsort(dim=1, stable=True))
        real = (cluster < last).sum(1)
        starts = torch.arange(0, max(1, T), self.stride, device=x.device)
        rank = starts[:, None] + torch.arange(self.window, device=x.device)  # (n, W)
        # a window that begins where the one before has reached the end would count its tokens twice
        fresh = (starts == 0) | (starts - self.stride + self.window < real[:, None])
        inside = (rank < real[:, None, None]) & fresh[..., None]
        token = order.gather(1, rank.clamp_max(T - 1).flatten()[None].expand(B, -1)).view(B, *rank.shape)
        at = torch.where(inside, token, -1)
        if not self.question:
            return at
        first = (~asked).to(torch.int8).sort(dim=1, stable=True).indices[:, : self.question]
        first = torch.where(asked.gather(1, first), first, -1)[:, None].expand(-1, len(starts), -1)
        alive = inside.any(-1, keepdim=True) | (starts == 0)[:, None]
        return torch.cat([torch.where(alive, first, -1), at], 2)

    def _nearest(self, x: Tensor) -> Tensor:
        found: Tensor = (x.to(self.means.dtype) @ self.means.T).argmax(-1)
        return found

    @torch.no_grad()
    def _remember(self, states: Tensor) -> None:
        """Write hidden states (n, X) over the oldest, and make new centroids when it is time."""
        if len(self.means) == 1:
            return
        states = (rows_of_all(states) if self.together else states)[-MEMORY:].to(self.memory.dtype)
        places = torch.tensor([1.0, BASE, BASE**2], device=states.device)
        calls, written = (int(n) for n in (self.seen.float() * places).sum(1))
        self.memory[(torch.arange(len(states), device=states.device) + written) % MEMORY] = states
        written += len(states)
        if calls == 0:
            self.fit(min(MEMORY, written))
        written = written if written < MEMORY else MEMORY + written % MEMORY
        for row, count in enumerate(((calls + 1) % self.refit, written)):
            for place in range(3):
                self.seen[row, place] = count // BASE**place % BASE

    @torch.no_grad()
    def fit(self, count: int) -> None:
        """K-means of the first `count` states in memory; centroids begin as states at even distances."""
        states, C = self.memory[:count], len(self.means)
        if not count:
            return
        self.means.copy_(states[torch.arange(C, device=states.device) * count // C])
        for _ in range(ITERATIONS):
            away = self.means.square().sum(-1) - 2 * states @ self.means.T
            nearest = away.argmin(-1)
            sums = torch.zeros_like(self.means).index_add_(0, nearest, states)
            number = torch.bincount(nearest, minlength=C).to(sums.dtype)[:, None]
            self.means.copy_(torch.where(number > 0, sums / number.clamp_min(1), self.means))
