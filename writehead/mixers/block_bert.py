"""BlockBERT: each head reads one block of keys for every block of queries, its own or one further on.

Paper     Qiu, Ma, Levy, Yih, Wang, Tang 2019, "Blockwise Self-Attention for Long Document Understanding",
          arXiv:1911.02972
Equation  S_i = {j : block(j) = (block(i) + s_h) mod n}, blocks of b tokens, a shift s_h for each head
State     encoder: none; causal form: a ring of (s + 1) b keys and values for the largest shift s
Cost      whole sequence O(T b)
Decodes   the causal form exactly; the paper's encoder cannot decode
Differs   the causal form looks back (block(i) - s_h, or the own block where there is none) with blocks of a
          fixed size b; the encoder's b follows from each row's length, b = ceil(T / n)
"""

from writehead.core.pattern import Block, Causal, Pattern, PerHead
from writehead.core.shapes import check_multiple
from writehead.mixers.softmax import ByLength
from writehead.positions.base import Scheme


def favoured(blocks: int, heads: int) -> list[int]:
    """A shift for each head: a sixth of the heads (at least one) for each shift but 0, which has the rest."""
    each = max(1, heads // 6)
    far = [s for s in range(1, blocks) for _ in range(each)][: max(0, heads - 1)]
    return [0] * (heads - len(far)) + far


class BlockBERT(ByLength):
    """Softmax attention from block to block."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "all",
        blocks: int = 2,
        shifts: list[int] | None = None,
        block: int | None = None,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H.
            head_dim: width D; default dim / heads.
            bias: which projections have one, as in `Softmax`.
            blocks: n, into so many a row is cut; the causal form has shifts below n.
            shifts: the shift of each key/value head; default most have 0, as the paper prefers.
            block: with a size b, the causal form.
            position: the model's position scheme.

        Raises:
            ValueError: shifts that are not one for each head, from 0 up to blocks - 1.
        """
        groups = heads if kv_heads is None else kv_heads
        check_multiple("heads", heads, "kv_heads", groups)
        given = favoured(blocks, groups) if shifts is None else list(shifts)
        if blocks < 1 or len(given) != groups or not all(0 <= s < blocks for s in given):
            raise ValueError(
                f"shifts={given}: need one for each of {groups} key/value heads, from 0 to {blocks - 1}"
            )
        self.blocks, self.shifts = blocks, [given[h * groups // heads] for h in range(heads)]
        self.block = block
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            pattern=self.pattern_for(blocks),
            position=position,
        )

    def pattern_for(self, length: int) -> Pattern:
        """Who may read whom in a sequence of `length` tokens."""
        own: list[Pattern] = []
        for s in self.shifts:
            if self.block is None:
                order = tuple((a + s) % self.blocks for a in range(self.blocks))
                own.append(Block(-(-length // self.blocks), blocks_read=order))
            else:
                own.append(Causal() & Block(self.block, back=s))
        return own[0] if len(set(own)) == 1 else PerHead(tuple(own))
