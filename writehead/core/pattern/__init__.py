"""Patterns of attention: who may read whom (see `base`)."""

from writehead.core.pattern.base import And, Columns, Or, Order, Pattern, PerHead, Reach
from writehead.core.pattern.image import Image1D, Image2D
from writehead.core.pattern.plain import Causal, Full, Leading, Readers, Span, Window, everywhere
from writehead.core.pattern.scattered import Random
from writehead.core.pattern.spec import PATTERNS, from_spec, to_spec
from writehead.core.pattern.strided import Axis, Block, Blocks, Dilated, Fixed, Strided

__all__ = [
    "PATTERNS", "And", "Axis", "Block", "Blocks", "Causal", "Columns", "Dilated", "Fixed", "Full",
    "Image1D", "Image2D", "Leading", "Or", "Order", "Pattern", "PerHead", "Random", "Reach", "Readers",
    "Span", "Strided", "Window", "everywhere", "from_spec", "to_spec",
]  # fmt: skip
