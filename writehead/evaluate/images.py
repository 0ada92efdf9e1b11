"""How well a model predicts images: bits per dimension, beside those of counting each pixel by itself."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from writehead.model.decoder import Decoder
from writehead.model.pixels import Categorical, Frame
from writehead.train.images import Bytes, Images, read_images, tokens_of


@dataclass(frozen=True)
class Bits:
    """The score of a model on images.

    Attributes:
        nll: negative log-likelihood of all positions, in nats.
        images, dims: how many images, and positions (pixels times channels) of each.
        levels: of a channel; bits of different levels do not compare.
        baseline: bits per dimension of the per-position marginal, if asked for.
    """

    nll: float
    images: int
    dims: int
    levels: int
    baseline: float | None = None

    @property
    def per_dim(self) -> float:
        """Bits per dimension."""
        return self.nll / (self.images * self.dims) / math.log(2)


def bits_per_dim(
    model: Decoder, sources: tuple[str, ...], *, counted: tuple[str, ...] = (), batch: int = 8
) -> Bits:
    """Score images.

    Args:
        model: of pixels, in evaluation mode.
        sources: images, as data.train of a run.
        counted: images whose levels are counted for the baseline, position by position.
        batch: images computed together.

    Raises:
        ValueError: a model of something else, or images of another size.
    """
    embedding = model.embedding
    if not isinstance(embedding, Categorical):
        raise ValueError("this model is not one of images: its config has no pixels")
    frame = embedding.frame
    tokens = tokens_of(read_images(sources, frame), frame)
    base = None
    if counted:
        base = marginal_bits(tokens_of(read_images(counted, frame), frame), tokens, frame)
    return Bits(score(model, tokens, frame, batch), len(tokens), frame.length, frame.levels, base)


@torch.inference_mode()
def score(model: Decoder, tokens: Bytes, frame: Frame, batch: int) -> float:
    """Nats of all positions of images (N, length)."""
    total, batches = 0.0, Images(tokens, frame, batch, None)
    for number in range(batches.count):
        one = batches(number).to(model.embedding.table.device)
        logits, _ = model(one.tokens)
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), one.target.flatten(), reduction="sum"))
    return total


def marginal_bits(counted: Bytes, scored: Bytes, frame: Frame) -> float:
    """Bits per dimension of the images `scored` where each position has the distribution that `counted` has
    there, every level counted once more than it occurs."""
    counts = np.ones((frame.length, frame.levels))
    for level in range(frame.levels):
        counts[:, level] += (counted == level).sum(0)
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    return float(np.take_along_axis(bits, scored.T.astype(np.int64), 1).mean())
