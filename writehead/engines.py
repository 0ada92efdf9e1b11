"""Opens a model on the engine that runs it best on this machine, and says which one that is and why."""

from dataclasses import dataclass
from pathlib import Path

import torch

from writehead.config import ModelConfig
from writehead.convert.build import fill
from writehead.convert.find import find
from writehead.convert.load import load
from writehead.convert.packed import load_packed
from writehead.convert.packed_map import is_packed
from writehead.convert.tokenizer import Tokenizer
from writehead.core.shapes import check_choice
from writehead.decode.engine import Engine, TorchEngine
from writehead.model.blank import blank
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq
from writehead.native.covers import NotCoveredError
from writehead.native.engine import NativeEngine
from writehead.native.formats import STEPS
from writehead.native.library import library
from writehead.native.state import STORED
from writehead.native.structs import FORMATS
from writehead.native.weights import PackedModel, unpack_weights

ENGINES = ("auto", "native", "torch")


@dataclass(frozen=True)
class Opened:
    """A model that is ready to decode.

    Attributes:
        engine: for `generate` and `stream`.
        tokenizer: None if the files hold none.
        config: the model's description.
        source: the folder or file it came from.
        dtype: the type of its weights.
        why: about the engine, in words for a report.
    """

    engine: Engine
    tokenizer: Tokenizer | None
    config: ModelConfig
    source: Path
    dtype: str
    why: str


def open_engine(
    name: str | Path,
    *,
    dtype: str | None = None,
    engine: str = "auto",
    cache_dtype: torch.dtype | None = None,
    threads: int | None = None,
    compile: bool = False,
    memory_bytes: int | None = None,
) -> Opened:
    """Load a model and give it to an engine.

    The PyTorch engine computes with the numbers that int8 and int4 stand for, in float32.

    Args:
        name: as for `load`.
        dtype: float32, bfloat16, int8 or int4; default that of a folder of `save_packed`, else float32.
        engine: "native", "torch", or "auto", which is native where it runs the model.
        cache_dtype: of the caches to come; None = as computed.
        threads: of the native engine; default the physical cores that this process may use. PyTorch has a
            setting of its own.
        compile: as for `TorchEngine`.
        memory_bytes: what may be used; a model that needs more is refused before its weights are read.

    Raises:
        ValueError: no such model, an argument that is refused, or an engine asked for that cannot run it.
        BadFile: files that are broken, or hold a model that we do not have.
    """
    check_choice("engine", engine, ENGINES)
    if dtype is not None:
        check_choice("dtype", dtype, FORMATS)
    against = "it was asked for" if engine == "torch" else _against(cache_dtype, compile)
    if engine == "native" and against is not None:
        raise ValueError(f"the native engine cannot be used: {against}; use engine='torch'")
    if against is None:
        try:
            return _native(name, dtype, threads, memory_bytes)
        except NotCoveredError as problem:
            if engine == "native":
                raise
            against = str(problem)
    return _torch(name, dtype, compile, memory_bytes, against)


def _against(cache_dtype: torch.dtype | None, compile: bool) -> str | None:
    """What stands against the native engine, whatever the model."""
    if compile:
        return "compiling is for the PyTorch engine"
    if cache_dtype not in STORED:
        word = str(cache_dtype).removeprefix("torch.")
        return f"it keeps caches in float32, bfloat16 or int8, not in {word}"
    loaded, why = library()
    return why if loaded is None else None


def _native(name: str | Path, dtype: str | None, threads: int | None, memory_bytes: int | None) -> Opened:
    loaded = load_packed(name, dtype, memory_bytes=memory_bytes)
    engine, format = NativeEngine(loaded.model, threads=threads), loaded.model.format
    why = f"{engine.instructions}, {format}, {engine.threads} thread{'s' * (engine.threads > 1)}"
    return Opened(engine, loaded.tokenizer, loaded.config, loaded.source, format, why)


def _torch(
    name: str | Path, dtype: str | None, compile: bool, memory_bytes: int | None, against: str
) -> Opened:
    path = find(name)
    if dtype in STEPS or (path.is_dir() and is_packed(path)):
        packed = load_packed(path, dtype, memory_bytes=memory_bytes)
        engine, format = TorchEngine(_unpacked(packed.model), compile=compile), packed.model.format
        why = f"{format} computed in float32; not the native one, since {against}"
        return Opened(engine, packed.tokenizer, packed.config, packed.source, format, why)
    loaded = load(name, dtype=getattr(torch, dtype or "float32"), memory_bytes=memory_bytes)
    if not isinstance(loaded.model, Decoder | Seq2Seq):
        raise ValueError(f"{type(loaded.model).__name__} cannot decode; give a Decoder or a Seq2Seq")
    engine = TorchEngine(loaded.model, compile=compile)
    why = f"{dtype or 'float32'}; not the native one, since {against}"
    return Opened(engine, loaded.tokenizer, loaded.config, loaded.source, dtype or "float32", why)


def _unpacked(packed: PackedModel) -> Decoder:
    model = fill(blank(packed.config), unpack_weights(packed))
    assert isinstance(model, Decoder)
    return model
