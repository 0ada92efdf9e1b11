"""Sparse Transformer: a local window or block, and a stride or summary columns that carry the rest.

Paper     Child, Gray, Radford, Sutskever 2019, "Generating Long Sequences with Sparse Transformers",
          arXiv:1904.10509
Equation  softmax attention over S_i; strided: near {j : 0 <= i-j < l}, far {j <= i : (i-j) mod l = 0};
          fixed: near {j <= i : floor(j/l) = floor(i/l)}, far {j <= i : l-c(s+1) <= j mod l < l-cs}
          for part s
State     strided: all keys and values, of which a step reads l + t/l; fixed: a ring of l - c and the c
          columns of every block, for each part in use; near alone: a ring of l
Cost      whole sequence O(T (l + T/l)) strided, O(T (l + c T/l)) fixed: O(T sqrt T) with l about sqrt T
Decodes   exactly
Differs   the window has l keys and a block c columns, as in the authors' code (the paper's text says l+1 and
          c+1); weights start at 0.125 / sqrt(width), the paper's factor for depth is `init: sparse` of the
          model's config, its attention embeddings are `grid` positions
"""

from torch import nn

from writehead.core.pattern import Block, Causal, Fixed, Pattern, PerHead, Strided, Window
from writehead.core.shapes import check_choice, check_multiple
from writehead.mixers.softmax import Softmax
from writehead.positions.base import Scheme

USES = ("merged", "near", "far", "heads")


def strided(stride: int, use: str) -> Pattern:
    """The strided pattern, or one of its halves."""
    near, far = Window(stride), Strided(stride)
    return {"near": near, "far": far}.get(use, near | far)


def fixed(stride: int, columns: int, part: int, use: str) -> Pattern:
    """The fixed pattern with the columns of one part, or one of its halves."""
    near, far = Causal() & Block(stride), Fixed(stride, columns, part)
    return {"near": near, "far": far}.get(use, near | far)


class SparseTransformer(Softmax):
    """One layer; interleaving is a list of two specs that tile over depth, "near" and "far"."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        kind: str = "fixed",
        stride: int = 128,
        columns: int = 32,
        parts: int = 1,
        use: str = "merged",
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D; default dim / heads.
            kind: "strided" (images, music) or "fixed" (text).
            stride: l, about the root of the context; for images the width.
            columns: c, fixed only: the columns of a block that later blocks read.
            parts: fixed only: key/value head g reads part g mod `parts` of the columns, so heads have
                summaries of their own.
            use: "merged" = one softmax over both halves, "near" or "far" = one of them, "heads" = key/value
                heads take them in turn.
            position: the model's position scheme.

        Raises:
            ValueError: an unknown kind or use, or more columns than a block has.
        """
        check_choice("kind", kind, ("strided", "fixed"))
        check_choice("use", use, USES)
        groups = heads if kv_heads is None else kv_heads
        check_multiple("heads", heads, "kv_heads", groups)
        own = [
            strided(stride, half) if kind == "strided" else fixed(stride, columns, g % parts, half)
            for g in range(groups)
            for half in [("near", "far")[g % 2] if use == "heads" else use]
        ]
        of_heads = tuple(own[h * groups // heads] for h in range(heads))
        pattern = of_heads[0] if len(set(of_heads)) == 1 else PerHead(of_heads)
        super().__init__(
            dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, pattern=pattern, position=position
        )
        for weight, width in ((self.qkv.weight, dim), (self.out.weight, self.out.in_features)):
            nn.init.normal_(weight, std=0.125 * width**-0.5)
