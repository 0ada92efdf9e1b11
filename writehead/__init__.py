"""Choose a cheap attention, train with it, convert a model to it, decode with it.

The names here are imported when they are first used, so `import writehead` alone is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from writehead.version import VERSION

if TYPE_CHECKING:
    from writehead.catalog import FEEDFORWARDS, MIXERS, PIXELS, POSITIONS, STACKS, build
    from writehead.config import ModelConfig
    from writehead.convert.load import load, save
    from writehead.convert.packed import load_packed, save_packed
    from writehead.core.pattern import Causal, Full, Leading, Pattern, PerHead, Window
    from writehead.core.positions import Positions
    from writehead.core.slots import Store
    from writehead.core.state import CannotRewind, detach, join, nbytes, rewind, select
    from writehead.decode.generate import generate, stream
    from writehead.engines import open_engine
    from writehead.model.decoder import Decoder
    from writehead.model.encoder import Encoder
    from writehead.model.seq2seq import Seq2Seq

__version__ = VERSION
_HOMES = {
    "catalog": ("FEEDFORWARDS", "MIXERS", "PIXELS", "POSITIONS", "STACKS", "build"),
    "config": ("ModelConfig",),
    "convert.load": ("load", "save"),
    "convert.packed": ("load_packed", "save_packed"),
    "core.cache": ("Store",),
    "core.pattern": ("Causal", "Full", "Leading", "Pattern", "PerHead", "Window"),
    "core.positions": ("Positions",),
    "core.state": ("CannotRewind", "detach", "join", "nbytes", "rewind", "select"),
    "decode.generate": ("generate", "stream"),
    "engines": ("open_engine",),
    "model.decoder": ("Decoder",),
    "model.encoder": ("Encoder",),
    "model.seq2seq": ("Seq2Seq",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FEEDFORWARDS",
    "MIXERS",
    "PIXELS",
    "POSITIONS",
    "STACKS",
    "CannotRewind",
    "Causal",
    "Decoder",
    "Encoder",
    "Full",
    "Leading",
    "ModelConfig",
    "Pattern",
    "PerHead",
    "Positions",
    "Seq2Seq",
    "Store",
    "Window",
    "__version__",
    "build",
    "detach",
    "generate",
    "join",
    "load",
    "load_packed",
    "nbytes",
    "open_engine",
    "rewind",
    "save",
    "save_packed",
    "select",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'writehead' has no attribute {name!r}")
    value = getattr(import_module(f"writehead.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
