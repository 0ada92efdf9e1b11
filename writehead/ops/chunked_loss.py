"""Cross-entropy without all logits at once: over long sequences they would be training's largest tensor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from writehead.core.shapes import check_shape


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

    def piece(part: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        scores = logits(part).flatten(0, 1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        wanted = wanted.clamp_min(-1).flatten()
        return (F.cross_entropy(scores, wanted, ignore_index=-1, reduction="sum"),)

    return in_pieces(piece, x, targets, chunk)[0] / count


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
