"""Nystromformer: the attention matrix from its rows and columns at a few landmarks.

Paper     Xiong et al. 2021, "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
          arXiv:2102.03902
Equation  y = softmax(Q Km^T) A+ softmax(Qm K^T) V + DConv(V), A = softmax(Qm Km^T), Qm and Km the means of M
          segments, scores scaled by D^-1/2, A+ by steps Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4
State     none: landmarks and A+ mix all positions
Cost      whole sequence O(T M H D + M^3 H)
Decodes   not at all
Differs   segments divide each row's real tokens, so padding and neighbours change nothing; of n tokens the
          first n mod M segments have one more; up to M tokens attention is the plain softmax. Both released
          PyTorch codes start A+ from a norm over batch and heads: coupled = True is that of one row's heads,
          theirs for a batch of one. A+ is computed in float32 or wider
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.heads import QKV
from writehead.core.positions import Positions
from writehead.core.shapes import check_choice, check_shape
from writehead.core.work import Call, Work, products, values
from writehead.mixer import NOTHING, Aux
from writehead.ops.attend import attend


class Nystromformer(nn.Module):
    """Bidirectional attention through landmarks."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        landmarks: int = 64,
        iterations: int = 6,
        kernel: int | None = 33,
        coupled: bool = False,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads, kv_heads, head_dim, bias: as in `Softmax`.
            landmarks: segments M.
            iterations: steps of the pseudo-inverse, a part of the function: six have not always converged.
            kernel: odd width of the convolution over values, one kernel a head; None = no convolution.
            coupled: start the pseudo-inverse from the largest norm of a row's heads.

        Raises:
            ValueError: numbers that do not divide or are out of range, an unknown bias.
        """
        super().__init__()
        check_choice("bias", bias, ("none", "qkv", "all"))
        if landmarks < 1 or iterations < 1:
            raise ValueError(f"landmarks={landmarks} and iterations={iterations} must both be at least 1")
        if kernel is not None and (kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"kernel={kernel} must be odd; nearest is {max(1, kernel + 1)}")
        self.landmarks, self.iterations, self.coupled = landmarks, iterations, coupled
        self.qkv = QKV(dim, heads, kv_heads, head_dim, bias != "none")
        H, D = self.qkv.heads, self.qkv.head_dim
        self.conv = None if kernel is None else nn.Parameter(torch.randn(H, kernel) * kernel**-0.5)
        self.out = nn.Linear(H * D, dim, bias=bias == "all")

    def work(self, call: Call) -> Work:
        H, D, T, M = self.qkv.heads, self.qkv.head_dim, call.tokens, self.landmarks
        own = T * T * 2 * D if T <= M else T * M * 4 * D + M * M * D * 2 + 4 * self.iterations * M**3
        own += 0 if self.conv is None else T * D * self.conv.shape[1]
        flops = 2 * call.rows * products(self.qkv, self.out) + 2 * call.batch * H * own
        return Work(flops=flops, weights=values(self))

    def encode(self, x: Tensor, pos: Positions) -> tuple[Tensor, Aux]:
        B, T = pos.index.shape
        check_shape("x", x, "B T X", B=B, T=T, X=self.qkv.weight.shape[1])
        H, G, valid = self.qkv.heads, self.qkv.kv_heads, pos.valid
        heads, v = self.qkv(x * valid[..., None])
        q, k = heads.split([H, G], 2)
        v = v * valid[..., None, None]
        rank, count, few = pos.once(_ranks, pos.index, self.landmarks)
        y = attend(q, k, v, mask=valid[:, None, None])[0] if bool(few.any()) else torch.zeros_like(q)
        if not bool(few.all()):
            near = self._landmarks(q, k, v, valid, rank, count)
            y = torch.where(few[:, None, None, None], y, near)
        if self.conv is not None:
            y = y + self._convolve(v, rank, valid)
        return self.out(y.flatten(2)), NOTHING

    def _landmarks(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, rank: Tensor, count: Tensor
    ) -> Tensor:
        H, G, M = q.shape[2], k.shape[2], self.landmarks
        segment = _segments(rank, count, M) == torch.arange(M, device=q.device)[:, None]  # (B, M, T)
        shares = (segment & valid[:, None]).to(q.dtype)
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(1)
        q_mean, k_mean = (torch.einsum("bmt,bthd->bmhd", shares, t) for t in (q, k))
        values_of = attend(q_mean, k, v, mask=valid[:, None, None])[0]  # softmax(Qm K^T) V
        keys = k_mean.repeat_interleave(H // G, 2)
        scores = torch.einsum("bmhd,bnhd->bhmn", q_mean, keys) * q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        inverse = pseudo_inverse(scores.to(wide).softmax(-1), self.iterations, self.coupled)
        read = torch.einsum("bhmn,bnhd->bmhd", inverse, values_of.to(wide)).to(q.dtype)
        return attend(q, keys, read)[0]

    def _convolve(self, v: Tensor, rank: Tensor, valid: Tensor) -> Tensor:
        """A convolution over each row's real tokens, which padding does not part."""
        assert self.conv is not None
        H, width = self.conv.shape
        B, T, G, D = v.shape
        place = rank[..., None, None].clamp_min(0).expand(B, T, G, D)
        packed = torch.zeros_like(v).scatter_add(1, place, v)
        rows = packed.repeat_interleave(H // G, 2).permute(0, 3, 2, 1).reshape(B * D, H, T)
        smooth = F.conv1d(rows, self.conv[:, None], padding=width // 2, groups=H)
        smooth = smooth.view(B, D, H, T).permute(0, 3, 2, 1)
        return smooth.gather(1, rank[..., None, None].clamp_min(0).expand(B, T, H, D))


def pseudo_inverse(a: Tensor, iterations: int, coupled: bool = False) -> Tensor:
    """Of matrices (B, H, M, M) whose rows sum to 1, by the paper's third-order steps.

    Args:
        a: the matrices.
        iterations: steps.
        coupled: start from the largest norm of a row's H matrices instead of from each one's own.
    """
    norm = a.sum(-2).amax(-1)  # largest column sum; that of rows is 1
    norm = norm.amax(-1, keepdim=True).expand_as(norm) if coupled else norm
    z, eye = (
        a.transpose(-1, -2) / norm[..., None, None],
        torch.eye(a.shape[-1], dtype=a.dtype, device=a.device),
    )
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def _ranks(index: Tensor, landmarks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The number of each real token in its row (-1 = padding), how many there are, and whether they are no
    more than the landmarks."""
    valid = index >= 0
    count = valid.sum(1)
    return torch.where(valid, valid.cumsum(1) - 1, -1), count, count <= landmarks


def _segments(rank: Tensor, count: Tensor, landmarks: int) -> Tensor:
    """The segment of each token (B, 1, T): the first `count mod landmarks` ones hold one token more."""
    size = torch.div(count, landmarks, rounding_mode="floor").clamp_min(1)[:, None]
    more = (count % landmarks)[:, None]
    long = torch.div(rank, size + 1, rounding_mode="floor")
    short = more + torch.div(rank - more * (size + 1), size, rounding_mode="floor")
    return torch.where(rank < more * (size + 1), long, short)[:, None]
