"""Image Transformer: pixels read blocks of pixels before them, along the raster or in two dimensions.

Paper     Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku, Tran 2018, "Image Transformer", arXiv:1802.05751
Equation  1D: S_i = {j : max(0, a l_q - l_m) <= j <= i}, a = floor(i / l_q); 2D: own block of rows x columns
          up to i, `beside` columns left of it, `above` rows over it with `beside` columns on both sides
State     1D: a ring of l_q + l_m keys and values; 2D: a ring that reaches back to the farthest key, W rows'
          worth of `above` and a block with its margin where the margins are whole blocks
Cost      whole sequence O(T (l_q + l_m)), 2D O(T (above + rows) (columns + 2 beside))
Decodes   exactly; in two dimensions positions count pixels in blocked raster order, blocks from left to right
          and top to bottom, pixels likewise inside: `pattern.pixel` and `pattern.position` translate
Differs   the inputs are shifted across blocks, never inside one; 2D images are whole blocks wide
"""

from writehead.core.pattern import Image1D, Image2D
from writehead.mixers.softmax import Softmax
from writehead.positions.base import Scheme


class ImageTransformer1D(Softmax):
    """Local attention along the raster."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "none",
        block: int = 256,
        memory: int = 256,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D; default dim / heads.
            bias: which projections have one, as in `Softmax`.
            block: l_q, queries of a block.
            memory: l_m, keys before the block.
            position: the model's position scheme.
        """
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            pattern=Image1D(block, memory),
            position=position,
        )


class ImageTransformer2D(Softmax):
    """Local attention in two dimensions."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        image_width: int = 32,
        patch: list[int] | None = None,
        margin: list[int] | None = None,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D; default dim / heads.
            image_width: of the image, in positions (three a pixel where channels are positions).
            patch: rows and columns of a block of queries; default 16 and 16.
            margin: rows above and columns beside the block that it reads; default 16 and 32.
            position: the model's position scheme.

        Raises:
            ValueError: patch or margin is not two numbers, or the image is not whole blocks wide.
        """
        patch, margin = patch or [16, 16], margin or [16, 32]
        if len(patch) != 2 or len(margin) != 2:
            raise ValueError(f"patch={patch} and margin={margin} must be two numbers each: rows and columns")
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            pattern=Image2D(image_width, *patch, *margin),
            position=position,
        )
