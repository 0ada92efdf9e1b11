"""Cross-attention: decoder tokens read an encoder's output, which is kept once for each source row.

Paper     Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762; kv_heads = 1: Shazeer 2019,
          arXiv:1911.02150
Equation  y_t = sum_s softmax_s(scale q_t.k_s) v_s over the source tokens s of the row's source
State     keys and values of each source (R, S, G, D), and for each decoder row the number of its source
Cost      one token O(S H D) operations over S G D * 2 values; several rows of one source read them once
Decodes   exactly; `select` moves row numbers and drops sources that no row reads any more
Differs   beams of one source are folded into the query rows of one product
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_shape
from writehead.core.state import Node, Once
from writehead.core.work import Call, Work, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.attend import attend


@dataclass(frozen=True)
class Memory(Node):
    """Keys and values of R sources, and which of them each of the B decoder rows reads.

    Attributes:
        k, v: (R, S, G, D).
        mask: (R, 1, 1, S) bool, False at padding.
        row: (B,) the source of each decoder row.
    """

    k: Tensor
    v: Tensor
    mask: Tensor
    row: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.mask, self.row)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Memory":
        return Memory(function(self.k), function(self.v), function(self.mask), function(self.row))

    def select(self, index: Tensor, once: Once) -> "Memory":
        row = once(torch.index_select, self.row, 0, index)
        read = once(torch.unique, row)
        if len(read) == len(self.k):
            return replace(self, row=row)
        k, v, mask = (t.index_select(0, read) for t in (self.k, self.v, self.mask))
        return Memory(k, v, mask, once(torch.searchsorted, read, row))

    def join(self, other: Node, once: Once) -> "Memory":
        assert isinstance(other, Memory)
        S = max(self.k.shape[1], other.k.shape[1])
        k, v = (
            torch.cat([F.pad(t, (0, 0, 0, 0, 0, S - t.shape[1])) for t in pair])
            for pair in ((self.k, other.k), (self.v, other.v))
        )
        mask = torch.cat([F.pad(t, (0, S - t.shape[-1])) for t in (self.mask, other.mask)])
        return Memory(k, v, mask, once(_join_rows, self.row, other.row, len(self.k)))

    def rewind(self, n: Tensor, once: Once) -> "Memory":
        return self


class Cross(nn.Module):
    """Reads the memory that `remember` made; takes part in a stack like any causal mixer."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        scale: float | None = None,
    ) -> None:
        """Make the mixer; the arguments are those of `Softmax`."""
        super().__init__()
        check_choice("bias", bias, ("none", "qkv", "all"))
        self.qkv = QKV(dim, heads, kv_heads, head_dim, bias != "none")
        self.out = nn.Linear(heads * self.qkv.head_dim, dim, bias=bias == "all")
        self.scale = self.qkv.head_dim**-0.5 if scale is None else scale

    def remember(self, source: Tensor, pos: Positions) -> Memory:
        """Project an encoder's output once.

        Args:
            source: (R, S, X).
            pos: where its tokens stand; padding is never read.
        """
        check_shape("source", source, "R S X", X=self.qkv.weight.shape[1])
        rows = self.qkv.heads * self.qkv.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[rows:]
        kv = F.linear(source, self.qkv.weight[rows:], bias).unflatten(-1, (-1, self.qkv.head_dim))
        k, v = kv.split(self.qkv.kv_heads, 2)
        return Memory(k, v, pos.valid[:, None, None], torch.arange(len(source), device=source.device))

    def memory_bytes(self, call: Call) -> int:
        """Bytes of the memory that a call reads: keys and values, the mask, and the source of each row."""
        slot = self.qkv.kv_heads * 2 * self.qkv.head_dim * call.itemsize
        return call.batch * (call.source * (slot + 1) + 8)

    def remember_work(self, call: Call) -> Work:
        """What `remember` takes for `call.source` tokens in each row."""
        G, D, X = self.qkv.kv_heads, self.qkv.head_dim, self.qkv.weight.shape[1]
        return Work(
            flops=2 * call.batch * call.source * 2 * G * D * X,
            weights=2 * G * D * (X + (self.qkv.bias is not None)),
            state_written=self.memory_bytes(call),
        )

    def work(self, call: Call) -> Work:
        H, G, D = self.qkv.heads, self.qkv.kv_heads, self.qkv.head_dim
        query = H * D * self.qkv.weight.shape[1]
        return Work(
            flops=2 * call.rows * (query + self.out.weight.numel()) + 2 * 2 * H * D * call.rows * call.source,
            weights=query + (0 if self.qkv.bias is None else H * D) + values(self.out),
            state_read=call.batch * call.source * G * 2 * D * call.itemsize,
        )

    def forward(self, x: Tensor, pos: Positions, state: Memory) -> tuple[Tensor, Memory, Aux]:
        rows = self.qkv.heads * self.qkv.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[:rows]
        q = F.linear(x, self.qkv.weight[:rows], bias).unflatten(-1, (-1, self.qkv.head_dim))
        (B, T), R = q.shape[:2], len(state.k)
        fanout = pos.once(_fanout, state.row, R)
        if fanout:
            y, _ = attend(
                q.reshape(R, fanout * T, *q.shape[2:]), state.k, state.v, mask=state.mask, scale=self.scale
            )
        else:
            k, v, mask = (t[state.row] for t in (state.k, state.v, state.mask))
            y, _ = attend(q, k, v, mask=mask, scale=self.scale)
        return self.out(y.reshape(B, T, -1)), state, NOTHING


def _fanout(row: Tensor, sources: int) -> int:
    """n if the rows are 0 n times, 1 n times, ... for all sources; 0 if they are in any other order."""
    n, rest = divmod(len(row), sources)
    regular = torch.arange(sources, device=row.device).repeat_interleave(n)
    return n if not rest and torch.equal(row, regular) else 0


def _join_rows(a: Tensor, b: Tensor, sources: int) -> Tensor:
    return torch.cat([a, b + sources])
