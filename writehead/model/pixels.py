"""Models of images: pixels in, a distribution over their levels out, categorical or a mixture of logistics.

Paper     Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku, Tran 2018, "Image Transformer", arXiv:1802.05751;
          Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", arXiv:1701.05517 (the mixture)
Equation  x_p = E_c[level of the position before p], c its channel; categorical: softmax(W y);
          logistics: P(v) = sum_k pi_k (F((v + 1/2 - m_k) / s_k) - F((v - 1/2 - m_k) / s_k)), F the logistic
          function, the lowest and the highest level take the tails
State     none
Cost      O(X) a position for its input, levels X (categorical) or mixtures (3 X + levels) for its output
Decodes   position after position, in the order of `Frame`; the first one follows the token `levels`
Differs   every channel is a position of its own for both outputs, so the mixture needs no linear terms
          between channels and no convolution that merges them
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.catalog import PIXELS, Spec, argument
from writehead.core.bind import Of, itself, product
from writehead.core.positions import Positions
from writehead.positions.base import Scheme
from writehead.positions.grid import blocks

LEAST_LOG_SCALE = -7.0  # of a logistic distribution, where all levels together are 2 wide


@dataclass(frozen=True)
class Frame:
    """The images of a model, and the order of their positions.

    Attributes:
        height, width, channels: of an image.
        levels: values of a channel, 2 to 256; images have 256, which fall into so many equal steps.
        patch: rows and columns of the blocks in which positions run; None: row after row. A column is a
            position, so channels count.
    """

    height: int
    width: int
    channels: int = 1
    levels: int = 256
    patch: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or self.channels not in (1, 3):
            raise ValueError(
                f"height={self.height} and width={self.width} must be at least 1, channels={self.channels} "
                "1 or 3"
            )
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels={self.levels} must be from 2 to 256")
        if self.patch is not None:
            blocks(self.height, self.width * self.channels, list(self.patch))  # raises unless they fit

    @property
    def length(self) -> int:
        """Positions of an image."""
        return self.height * self.width * self.channels

    @property
    def start(self) -> int:
        """The token that comes before the first position."""
        return self.levels

    def order(self, position: Tensor) -> Tensor:
        """Where each position is in (height, width, channels)."""
        if self.patch is None:
            return position
        image = blocks(self.height, self.width * self.channels, list(self.patch))
        row, column = image.pixel(position)
        places: Tensor = row * image.width + column
        return places

    def tokens(self, images: Tensor) -> Tensor:
        """uint8 images (N, height, width, channels) -> levels (N, length) int64 in the order of positions."""
        levels = (images.flatten(1).long() * self.levels).div(256, rounding_mode="floor")
        return levels[:, self.order(torch.arange(self.length))]

    def images(self, tokens: Tensor) -> Tensor:
        """The reverse: a level becomes the grey value at its place between 0 and 255."""
        values = (tokens * 255).div(self.levels - 1, rounding_mode="floor").to(torch.uint8)
        out = torch.empty_like(values)
        out[:, self.order(torch.arange(self.length))] = values
        return out.view(-1, self.height, self.width, self.channels)


class Categorical(nn.Module):
    """An embedding for each level of each channel; logits over the levels."""

    norm = None
    bias = None
    types = None

    def __init__(
        self,
        dim: int,
        vocab: int,
        position: Scheme,
        *,
        height: int,
        width: int,
        channels: int = 1,
        levels: int = 256,
        patch: list[int] | None = None,
    ) -> None:
        """Make it.

        Args:
            dim: width X.
            vocab: levels + 1.
            position: the model's position scheme.
            height, width, channels: of an image.
            levels: values of a channel, 2 to 256.
            patch: rows and columns of the blocks in which positions run; default row after row.

        Raises:
            ValueError: an image or a vocabulary that does not fit.
        """
        super().__init__()
        self.frame = Frame(height, width, channels, levels, None if patch is None else tuple(patch))
        if vocab != levels + 1:
            raise ValueError(
                f"vocab={vocab} must be levels + 1 = {levels + 1}: the levels, and the token that begins"
            )
        self.position = position
        self.table = nn.Parameter(torch.empty(channels * levels + 1, dim))
        nn.init.normal_(self.table, std=0.02)
        self.output = nn.Parameter(torch.empty(self.outputs, dim))
        nn.init.normal_(self.output, std=dim**-0.5)

    @property
    def outputs(self) -> int:
        """Rows of the output matrix."""
        return self.frame.levels

    def forward(self, tokens: Tensor, pos: Positions) -> Tensor:
        """tokens (B, T), -1 = padding, at position p the level of position p - 1 -> (B, T, X).

        Raises:
            ValueError: a token that is no level.
        """
        frame, last = self.frame, int(tokens.max())
        if last > frame.levels:
            raise ValueError(
                f"token {last} is no level of {frame.levels} (0 to {frame.levels - 1}, {frame.start} begins)"
            )
        channel = frame.order((pos.index - 1).clamp_min(0)) % frame.channels
        begins = tokens == frame.start
        row = torch.where(begins, len(self.table) - 1, channel * frame.levels + tokens.clamp_min(0))
        x = F.embedding(row, self.table)
        places = self.position.embed(pos, x.dtype)
        return x if places is None else x + places

    def bind_logits(self, of: Of = itself) -> Callable[[Tensor], Tensor]:
        """`logits` as a plain function."""
        head = product(of, self.output, None)
        return lambda x: _never_begins(head(x))

    def logits(self, x: Tensor) -> Tensor:
        """x (..., X) -> (..., V); the token that begins is never drawn."""
        return self.bind_logits()(x)


class Logistics(Categorical):
    """The same, with the levels' probabilities from a mixture of logistic distributions."""

    def __init__(
        self,
        dim: int,
        vocab: int,
        position: Scheme,
        *,
        height: int,
        width: int,
        channels: int = 1,
        levels: int = 256,
        patch: list[int] | None = None,
        mixtures: int = 10,
    ) -> None:
        """Make it; `mixtures` are the logistic distributions of a position, the rest is as in `Categorical`.

        Args:
            dim: width X.
            vocab: levels + 1.
            position: the model's position scheme.
            height, width, channels: of an image.
            levels: values of a channel, 2 to 256.
            patch: rows and columns of the blocks in which positions run; default row after row.
            mixtures: logistic distributions of a position.

        Raises:
            ValueError: an image or a vocabulary that does not fit, or no distribution.
        """
        if mixtures < 1:
            raise ValueError(f"mixtures={mixtures} must be at least 1")
        self.mixtures = mixtures
        super().__init__(
            dim, vocab, position, height=height, width=width, channels=channels, levels=levels, patch=patch
        )
        self.shift = nn.Parameter(torch.zeros(3, mixtures))
        with torch.no_grad():
            self.shift[1] = torch.linspace(-1, 1, mixtures)  # means begin apart, or they would stay equal
            self.shift[2] = -2.0

    @property
    def outputs(self) -> int:
        return 3 * self.mixtures

    def bind_logits(self, of: Of = itself) -> Callable[[Tensor], Tensor]:
        head, shift, levels = product(of, self.output, None), self.shift, self.frame.levels
        return lambda x: _never_begins(log_levels(head(x).unflatten(-1, shift.shape) + shift, levels))


def log_levels(mixture: Tensor, levels: int) -> Tensor:
    """Log-probabilities of all levels under mixtures of logistic distributions.

    Args:
        mixture: (..., 3, K): logits of the parts, means (-1 is the lowest level, 1 the highest), log scales.
        levels: L.

    Returns:
        (..., L), which add up to 1 in probability.
    """
    logits, means, scales = mixture.unbind(-2)
    inverse = (-scales.clamp_min(LEAST_LOG_SCALE)).exp()[..., None]
    width = 2 / (levels - 1)
    edges = torch.arange(levels - 1, dtype=mixture.dtype, device=mixture.device) * width - 1 + width / 2
    z = (edges - means[..., None]) * inverse  # (..., K, L - 1)
    below = F.logsigmoid(z)
    above = below - z  # log(1 - F) without a difference of numbers near 1
    inside = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(-width * inverse))
    each = torch.cat([below[..., :1], inside, above[..., -1:]], -1)
    return (logits.log_softmax(-1)[..., None] + each).logsumexp(-2)


def _never_begins(logits: Tensor) -> Tensor:
    return F.pad(logits, (0, 1), value=float("-inf"))


def frame_of(spec: Spec) -> Frame:
    """The images of the model that a spec of `ModelConfig.pixels` describes.

    Raises:
        ValueError: an unknown row, a missing size, or images that cannot be.
    """
    values = {f.name: argument(PIXELS, spec, f.name) for f in fields(Frame)}
    for name in ("height", "width"):
        if values[name] is None:
            raise ValueError(f"{spec.get('name')} needs {name}; got {dict(spec)}")
    return Frame(**values | {"patch": None if values["patch"] is None else tuple(values["patch"])})
