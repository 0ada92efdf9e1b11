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
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    count = int((targets >= 0).sum())
    if not count:
        raise ValueError("no target counts: all are negative")

    def piece(part: Tensor, wanted: Tensor) -> Tensor:
        scores = logits(part).flatten(0, 1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.cross_entropy(scores, wanted.clamp_min(-1).flatten(), ignore_index=-1, reduction="sum")

    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for part, wanted in zip(x.split(chunk, 1), targets.split(chunk, 1), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(piece, part, wanted, use_reentrant=False)
        else:
            total = total + piece(part, wanted)
    return total / count
