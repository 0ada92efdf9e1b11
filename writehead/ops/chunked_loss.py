"""Cross-entropy whose gradient is made with it, a piece of the logits at a time.

Over long sequences and large vocabularies all logits at once would be training's largest tensor, and passing
over them again and again would take longer than the products beside them. A piece stays in the processor's
cache: its logits become their own gradient in place, and go at once into those of the hidden state and of the
output matrix.

Equation  lse_n = log sum_v exp(s_nv), nll_n = lse_n - s_n,target;
          loss = sum_n (1 - smooth) nll_n + smooth (lse_n - mean_v s_nv) + z lse_n^2;
          d loss / d s_nv = (1 + 2 z lse_n) p_nv - (1 - smooth) [v = target] - smooth / V
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from writehead.core.shapes import check_shape

PIECE = 1 << 20  # logits of one piece: few enough for the cache, enough rows for the products
ROWS = 64  # a piece's least rows, however large the vocabulary


class Terms(NamedTuple):
    """What a loss is made of.

    Attributes:
        smooth: share of each target that is spread over the vocabulary.
        z: weight of the squared log-sum-exp.
    """

    smooth: float = 0.0
    z: float = 0.0


PLAIN = Terms()


def chunked_loss(
    logits: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor, *, chunk: int = 1024
) -> Tensor:
    """The mean cross-entropy in nats of all targets; logits of one piece at a time, made again backwards.

    Args:
        logits: the last hidden state (B, T, X) -> (B, T, V), such as `Decoder.logits`.
        x: (B, T, X).
        targets: (B, T) token ids, negative = does not count.
        chunk: tokens of a row in one piece.

    Raises:
        ValueError: shapes that do not fit, a chunk below 1, or no target that counts.
    """
    check_shape("targets", targets, "B T", B=x.shape[0], T=x.shape[1])
    count = int((targets >= 0).sum())
    if not count:
        raise ValueError("no target counts: all are negative")
    return in_pieces(lambda part, wanted: loss_of(logits(part), wanted), x, targets, chunk)[0] / count


def in_pieces(
    piece: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, ...]:
    """The sums over all pieces of what `piece` gives for one; what it computes is made again backwards.

    Args:
        piece: a part of x and of the targets -> sums over that part.
        x: (B, T, X).
        targets: (B, T).
        chunk: tokens of a row in one piece.

    Raises:
        ValueError: a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    found: tuple[Tensor, ...] = ()
    for part, wanted in zip(x.split(chunk, 1), targets.split(chunk, 1), strict=True):
        again = torch.is_grad_enabled()
        sums = checkpoint(piece, part, wanted, use_reentrant=False) if again else piece(part, wanted)
        found = tuple(a + b for a, b in zip(found, sums, strict=True)) if found else sums
    return found


def loss_of(logits: Tensor, targets: Tensor, terms: Terms = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over targets whose logits are there already.

    Args:
        logits: (B, T, V).
        targets: (B, T), negative = does not count.
        terms: of the loss.

    Returns:
        The loss, the negative log-likelihood in nats and the hits: targets likelier than any other token;
        the last two without gradient.
    """
    found: tuple[Tensor, Tensor, Tensor] = _OfLogits.apply(logits, targets, terms)  # type: ignore[no-untyped-call]
    return found


def head_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, terms: Terms = PLAIN, chunk: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_of` the logits x weight^T + bias, of which one piece at a time exists.

    Args:
        x: (B, T, X).
        weight: (V, X).
        bias: (V,), or None.
        targets: (B, T), negative = does not count.
        terms: of the loss.
        chunk: at most so many tokens of each row in one piece; 0 = as many as are fast.
    """
    rows = max(ROWS, PIECE // len(weight))
    rows = min(rows, chunk * len(x)) if chunk else rows
    graph = torch.is_grad_enabled()
    found: tuple[Tensor, Tensor, Tensor] = _OfHead.apply(x, weight, bias, targets, terms, rows, graph)  # type: ignore[no-untyped-call]
    return found


class _OfLogits(torch.autograd.Function):
    """`loss_of`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
        flat, target = logits.flatten(0, -2), targets.flatten()
        rows = _counted(target)
        picked = flat if rows is None else flat[rows]
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = picked.to(wide, copy=True) if rows is None else picked.to(wide)
        sums = _sums_and_gradient(scores, target if rows is None else target[rows], terms)
        ctx.save_for_backward(_spread(scores.to(logits.dtype), rows, flat).view_as(logits))
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        _check_first()
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None


class _OfHead(torch.autograd.Function):
    """`head_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        terms: Terms,
        rows: int,
        graph: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat, target = x.flatten(0, 1), targets.flatten()
        counted = _counted(target)
        read, target = (flat, target) if counted is None else (flat[counted], target[counted])
        kind, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
        wide = torch.promote_types(kind, torch.float32)
        matrix, dx = weight.to(kind), torch.empty_like(read) if graph else read
        grown = weight.new_zeros(weight.shape, dtype=wide) if graph else matrix
        shift = None if bias is None else bias.to(kind)
        lifted = None if bias is None else bias.new_zeros(bias.shape, dtype=wide)
        parts = []
        with torch.autocast(device, enabled=False):
            for first in range(0, max(1, len(read)), rows):
                part = read[first : first + rows].to(kind)
                scores = F.linear(part, matrix, shift).to(wide)
                parts.append(_sums_and_gradient(scores, target[first : first + rows], terms, graph))
                if not graph:
                    continue
                slopes = scores.to(kind)
                dx[first : first + rows] = slopes @ matrix
                if kind == wide:
                    grown.addmm_(slopes.t(), part)
                else:
                    grown += slopes.t() @ part
                if lifted is not None:
                    lifted += scores.sum(0)
        if graph:
            ctx.gradients = (_spread(dx, counted, flat).view_as(x), grown.to(weight.dtype), lifted)
        loss, nll, right = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
        ctx.mark_non_differentiable(nll, right)
        return loss, nll, right

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        _check_first()
        if ctx.gradients is None:
            raise ValueError("the training loss goes backwards once; compute it again for a second time")
        made, ctx.gradients = ctx.gradients, None  # used up: they are as large as the output matrix
        scaled = [
            None if gradient is None else gradient.mul_(outer[0].to(gradient.dtype)) for gradient in made
        ]
        return (*scaled, None, None, None, None)


def _check_first() -> None:
    """Raise where a derivative of the gradient is wanted, which was made by hand."""
    if torch.is_grad_enabled():
        raise ValueError(
            "the training loss has first derivatives only (create_graph=True was given); a loss made of "
            "`logits` and torch.nn.functional.cross_entropy has more"
        )


def _counted(target: Tensor) -> Tensor | None:
    """The rows whose target counts; None = all."""
    valid = target >= 0
    return None if bool(valid.all()) else valid.nonzero()[:, 0]


def _spread(gradient: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of all rows from that of some."""
    return gradient if rows is None else torch.zeros_like(like).index_copy_(0, rows, gradient)


def _sums_and_gradient(
    scores: Tensor, target: Tensor, terms: Terms, graph: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over n targets of their loss, negative log-likelihood and hits; scores (n, V) become its gradient.

    The target stands aside: what is left says whether anything is likelier, and 1 - p keeps its digits.
    """
    V, smooth, z = scores.shape[1], *terms
    at = target[:, None]
    mean = scores.mean(1, keepdim=True) if smooth else None
    own = scores.gather(1, at)
    scores.scatter_(1, at, -torch.inf)
    rival = scores.amax(1, keepdim=True)
    top = torch.maximum(own, rival)
    scores.sub_(top).exp_()
    rest = scores.sum(1, keepdim=True)
    mine = (own - top).exp()
    total = rest + mine
    above = torch.where(own > rival, torch.log1p(rest), total.log())  # of the log-sum-exp over the top
    lse, nll = above + top, above + (top - own)
    right = (own > rival).sum()
    loss = nll if mean is None else (1 - smooth) * nll + smooth * (lse - mean)
    loss = loss + z * lse.square() if z else loss
    if graph:
        gain = 1 + 2 * z * lse
        scores.mul_(gain / total)
        if smooth:
            scores.sub_(smooth / V)
        scores.scatter_(1, at, 2 * z * lse * mine / total - rest / total + smooth * (1 - 1 / V))
    return loss.sum(), nll.sum(), right
