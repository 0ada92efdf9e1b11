"""Images drawn from a model of pixels, position after position from its decode state."""

import torch
from torch import Tensor

from writehead.decode.generate import generate
from writehead.decode.result import Timings
from writehead.model.decoder import Decoder
from writehead.model.pixels import Categorical


def draw_images(
    model: Decoder, count: int, *, temperature: float = 1.0, seed: int | None = None
) -> tuple[Tensor, Timings]:
    """Draw images.

    Args:
        model: of pixels.
        count: how many, all in one batch.
        temperature: above 0; 1 draws from the model's own distribution.
        seed: of the draws; default a fresh one.

    Returns:
        uint8 (count, height, width, channels), and what it took.

    Raises:
        ValueError: a model of something else, or a number out of range.
    """
    embedding = model.embedding
    if not isinstance(embedding, Categorical):
        raise ValueError("this model is not one of images: its config has no pixels")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: the likeliest image is an empty one")
    frame = embedding.frame
    found = generate(
        model,
        [[frame.start]],
        max_new_tokens=frame.length,
        temperature=temperature,
        num_return_sequences=count,
        seed=seed,
    )
    return frame.images(torch.tensor([one.tokens for one in found])), found.timings


def sheet(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Images side by side.

    Args:
        images: uint8 (N, height, width, channels).
        columns: images of a row.
        scale: pixels of the sheet for a pixel of an image, along each side.
        gap: grey pixels between images.

    Returns:
        uint8 (height, width, channels) of the whole sheet.
    """
    big = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    N, h, w, channels = big.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    out = torch.full((rows * (h + gap) + gap, columns * (w + gap) + gap, channels), 128, dtype=torch.uint8)
    for number, image in enumerate(big):
        top, left = gap + number // columns * (h + gap), gap + number % columns * (w + gap)
        out[top : top + h, left : left + w] = image
    return out
