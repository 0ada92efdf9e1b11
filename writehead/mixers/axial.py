"""Axial attention: pixels read the pixels of their column, or of their row; layers alternate.

Paper     Ho, Kalchbrenner, Weissenborn, Salimans 2019, "Axial Attention in Multidimensional Transformers",
          arXiv:1912.12180
Equation  softmax attention along one axis of an image, row after row: axis 0 reads {j : j = i mod width},
          axis 1 reads {j : floor(j / width) = floor(i / width)}; masked: of these the j <= i
State     masked axis 0: all keys and values, of which a step reads one column; masked axis 1: a ring of a row
Cost      whole sequence O(T (height + width)) over the two axes: O(T sqrt T)
Decodes   the masked forms exactly
Differs   one layer along one axis; the paper's outer and inner decoders are the stack `axial_decoders`
"""

from writehead.core.pattern import Axis, Block, Causal, Pattern, Strided
from writehead.mixers.softmax import ByLength
from writehead.positions.base import Scheme


class Axial(ByLength):
    """Softmax attention along one axis of an image of any height."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "all",
        image_width: int = 32,
        axis: int = 0,
        causal: bool = False,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D; default dim / heads.
            bias: which projections have one, as in `Softmax`.
            image_width: pixels of a row.
            axis: 0 = along columns, 1 = along rows.
            causal: masked: no later pixel is read.
            position: the model's position scheme.

        Raises:
            ValueError: an axis other than 0 and 1, or an image without width.
        """
        Axis(1, image_width, axis)  # refuses what is no axis of an image
        self.image_width, self.axis, self.is_causal = image_width, axis, causal
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            pattern=self.pattern_for(1),
            position=position,
        )

    def pattern_for(self, length: int) -> Pattern:
        """Who may read whom in a sequence of `length` pixels."""
        if self.axis == 1:
            return Causal() & Block(self.image_width) if self.is_causal else Block(self.image_width)
        if self.is_causal:
            return Strided(self.image_width)
        return Axis(-(-length // self.image_width), self.image_width, 0)
