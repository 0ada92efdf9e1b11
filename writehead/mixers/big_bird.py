"""Big Bird: a window of blocks, global blocks, and random blocks for each head.

Paper     Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062
Equation  block row a of m reads {0, a-1, a, a+1, m-1} and r random blocks; rows 0 and m-1 read all; one
          softmax
State     encoder: none; causal form: all keys and values
Cost      whole sequence O(T b (5 + r)), and 2 b T for the global rows
Decodes   the causal form exactly; the paper's encoder cannot decode
Differs   a key counts once, however it is reached; random blocks are drawn from all others by a counter of
          (seed, key/value head, block row), not in the stages that the paper's code has for some lengths;
          the causal form reads {0, a-1, a} and random blocks before a-1, which no longer depend on T
"""

from writehead.core.pattern import Blocks, Causal, Leading, Pattern, PerHead, Random, everywhere
from writehead.core.shapes import check_multiple
from writehead.mixers.softmax import ByLength
from writehead.positions.base import Scheme


class BigBird(ByLength):
    """The internal-global form (ITC): the first and the last block are global."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: str = "qkv",
        block: int = 64,
        random: int = 3,
        seed: int = 0,
        causal: bool = False,
        position: Scheme | None = None,
    ) -> None:
        """Make the mixer.

        Args:
            dim: width X.
            heads: query heads H.
            kv_heads: key/value heads G; default H. Each has random blocks of its own.
            head_dim: width D; default dim / heads.
            bias: which projections have one, as in `Softmax`.
            block: b, tokens of a block.
            random: r, random blocks of a block row; 0 = none.
            seed: of the random blocks; give each layer its own.
            causal: the causal form.
            position: the model's position scheme.

        Raises:
            ValueError: a size that is too small.
        """
        if block < 1 or random < 0 or seed < 0:
            raise ValueError(
                f"block={block}, random={random}, seed={seed}: block must be at least 1, the others 0"
            )
        groups = heads if kv_heads is None else kv_heads
        check_multiple("heads", heads, "kv_heads", groups)
        self.block, self.random, self.is_causal = block, random, causal
        self.seeds = [seed * groups + h * groups // heads for h in range(heads)]
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            pattern=self.pattern_for(block),
            position=position,
        )

    def pattern_for(self, length: int) -> Pattern:
        """Who may read whom in a sequence of `length` tokens."""
        b, m = self.block, -(-length // self.block)
        near: Pattern = Causal() & (Blocks(b, 1) | Leading(b))
        if not self.is_causal:
            near = Blocks(b, 1, 1) | everywhere(0, b) | everywhere((m - 1) * b, b)
        drawn = 0 if self.is_causal else m  # without a number only earlier blocks are drawn
        own: list[Pattern] = [
            near | Random(b, self.random, seed, 1, drawn) if self.random else near for seed in self.seeds
        ]
        return own[0] if len(set(own)) == 1 else PerHead(tuple(own))
