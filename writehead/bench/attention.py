"""One-token attention over a long cache with one write-head: ours beside PyTorch's `enable_gqa`, same
tensors, in turns."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from writehead.bench.machine import Roofs, roofline_seconds
from writehead.bench.measure import Timing, alternate
from writehead.ops.attend import attend

HEADS, HEAD_DIM = 16, 64


@dataclass(frozen=True)
class Attention:
    """One batch and context, float32.

    Attributes:
        batch, context: what was measured.
        ours, enable_gqa: seconds of one call.
        roof_s: the least time: the cache once over the bandwidth at its size, or the products over the
        matrix rate.
    """

    batch: int
    context: int
    ours: Timing
    enable_gqa: Timing
    roof_s: float

    @property
    def times(self) -> float:
        """How many times faster ours is."""
        return self.enable_gqa.median / self.ours.median

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self) | {"times": self.times}


def one_token(
    batches: Iterable[int],
    contexts: Iterable[int],
    roofs: Roofs,
    *,
    rounds: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> list[Attention]:
    """Measure one query token of 16 heads over caches with one key/value head.

    Args:
        batches, contexts: rows, and cached tokens.
        roofs: of this machine, of this run.
        rounds: samples of each.
        say: told what happens, before it happens.
    """
    found = []
    for batch in batches:
        for context in contexts:
            say(f"one-token attention, batch {batch}, context {context}")
            q = torch.randn(batch, 1, HEADS, HEAD_DIM)
            k, v = torch.randn(2, batch, 1, context, HEAD_DIM).unbind()

            def ours(q: Any = q, k: Any = k, v: Any = v) -> None:
                attend(q, k.transpose(1, 2), v.transpose(1, 2))

            def theirs(q: Any = q, k: Any = k, v: Any = v) -> None:
                F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)

            with torch.inference_mode():
                timings = alternate(
                    {"ours": ours, "enable_gqa": theirs}, rounds, min_seconds=0.2, max_rounds=rounds
                )
            roof = roofline_seconds(2 * k.nbytes, 4 * HEADS * k.numel(), roofs, 2 * k.nbytes)
            found.append(Attention(batch, context, timings["ours"], timings["enable_gqa"], roof))
    return found
