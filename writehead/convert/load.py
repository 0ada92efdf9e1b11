"""The front door: a model and its tokenizer out of a name, a folder or a GGUF file, and into a folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from writehead.config import ModelConfig
from writehead.convert import gguf_llama
from writehead.convert.build import fill
from writehead.convert.errors import BadFile, shown
from writehead.convert.files import read_tensors, write_tensors
from writehead.convert.find import find
from writehead.convert.gguf import GGUF, open_gguf
from writehead.convert.huggingface import longest_side, open_huggingface, to_huggingface
from writehead.convert.packed_files import read_packed
from writehead.convert.packed_map import is_packed
from writehead.convert.rules import Checkpoint, Rule, load_weights
from writehead.convert.strict_json import read_json
from writehead.convert.tokenizer import Tokenizer
from writehead.convert.writing import whole_or_nothing, write_json
from writehead.core.shapes import check_choice
from writehead.model.blank import blank
from writehead.model.decoder import Decoder
from writehead.model.parts import weights
from writehead.native.weights import unpack_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OURS = (Rule("{name}", ("{name}",)),)
SIDES = ("heads", "kv_heads", "head_dim", "hidden")  # arguments that are the side of a tensor, or less


@dataclass(frozen=True)
class Loaded:
    """What `load` gives.

    Attributes:
        model: a Decoder, Encoder or Seq2Seq, in evaluation mode.
        tokenizer: None if the files hold none.
        config: the model's description.
        source: the folder or file it came from.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    config: ModelConfig
    source: Path


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_bytes: int | None = None,
) -> Loaded:
    """Load a model.

    Args:
        name: "smollm2", a folder (ours, a training run's or Hugging Face's), or a FILE.gguf of the Llama
            family; a folder of a packed model gives the numbers that its integers stand for.
        dtype: of the weights: float32, bfloat16, float16 or float64.
        device: where they go.
        memory_bytes: what may be used; a model that needs more is refused before its weights are read.

    Raises:
        ValueError: no such model, or an argument that is refused.
        BadFile: files that are broken, or hold a model that we do not have.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported (accepted: {', '.join(map(_word, DTYPES))})")
    place = _device(device)
    path = find(name)
    try:
        if path.is_dir() and is_packed(path):
            decoder = _unpacked(path, dtype, place, memory_bytes)
            return Loaded(decoder.eval(), read_tokenizer(path, None), decoder.config, path)
        checkpoint, gguf = open_checkpoint(path, dtype)
        check_sizes(checkpoint)
        model = blank(checkpoint.config)
        like = weights(model)
        _check_memory(like, dtype, memory_bytes)
        fill(model, load_weights(checkpoint, like, dtype, place))
        tokenizer = read_tokenizer(path, gguf)
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    return Loaded(model.eval(), tokenizer, checkpoint.config, path)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    format: str = "writehead",
    tokenizer: Tokenizer | None = None,
    model_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model into a folder, whole or not at all.

    Args:
        model: a Decoder, Encoder or Seq2Seq.
        directory: the folder to make.
        format: "writehead", which holds every model, or "huggingface", if one of its families can.
        tokenizer: saved beside the model.
        model_type: huggingface only: the family to write; default the first that fits.
        overwrite: replace a model folder that is there.

    Raises:
        ValueError: a model that the format cannot hold, or a folder that may not be made.
    """
    check_choice("format", format, ("writehead", "huggingface"))
    if model_type is not None and format != "huggingface":
        raise ValueError(f"model_type={model_type!r} is for format='huggingface'; got format={format!r}")
    config, ours = model.config, weights(model)
    assert isinstance(config, ModelConfig)
    values: dict[str, Any] = config.to_dict()
    tensors: Mapping[str, Tensor] = ours
    if format == "huggingface":
        values, tensors = to_huggingface(config, ours, model_type)
        values |= _special(tokenizer)
    with whole_or_nothing(directory, overwrite=overwrite) as folder:
        write_tensors(folder, tensors)
        write_json(folder / "config.json", values)
        if tokenizer is not None:
            tokenizer.save(folder)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device of torch (such as cpu, cuda, cuda:1)") from error


def _unpacked(path: Path, dtype: torch.dtype, place: torch.device, memory_bytes: int | None) -> Decoder:
    """A packed model as an ordinary one."""
    packed = read_packed(path)
    model = blank(packed.config)
    _check_memory(weights(model), dtype, memory_bytes)
    fill(model, {name: one.to(place) for name, one in unpack_weights(packed, dtype).items()})
    assert isinstance(model, Decoder)
    return model


def open_checkpoint(path: Path, dtype: torch.dtype) -> tuple[Checkpoint, GGUF | None]:
    """A folder or a GGUF file, with all but its tensors' data read."""
    if path.suffix == ".gguf" and path.is_file():
        file = open_gguf(path)
        return gguf_llama.open_model(file, dtype), file
    _check_folder(path)
    values = read_json(path / "config.json")
    theirs = read_tensors(path)
    if "writehead" in values:
        return Checkpoint(ModelConfig.from_dict(values), OURS, theirs, longest_side(theirs)), None
    return open_huggingface(values, theirs), None


def _check_folder(path: Path) -> None:
    """Raise, saying what was looked for and what is there instead, unless a folder looks like a model."""
    held = [one.name for one in path.iterdir()]
    tensors = [name for name in held if name in ("model.safetensors", "model.safetensors.index.json")]
    if "config.json" in held and tensors:
        return
    problem = "is not a model folder: looked for config.json and model.safetensors (or its .index.json)"
    if ggufs := [name for name in held if name.endswith(".gguf")]:
        problem += f"; to load {ggufs[0]}, give the path of that file"
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in held):
        problem += "; weights in pickles (.bin, .pt) are never read, save them as safetensors"
    raise BadFile(path, problem)


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise if a config promises more than its tensors could hold, before anything of that size is built."""
    side = checkpoint.longest_side
    for config in filter(None, (checkpoint.config, checkpoint.config.encoder)):
        if config.depth > len(checkpoint.theirs):
            raise ValueError(
                f"the config has {config.depth} layers, the checkpoint only {len(checkpoint.theirs)} tensors"
            )
        layers = config.mixer if isinstance(config.mixer, tuple) else (config.mixer,)
        others = config.feedforward if isinstance(config.feedforward, tuple) else (config.feedforward,)
        named: list[tuple[str, Any]] = [("vocab", config.vocab), ("dim", config.dim)]
        named.append(("token_types", config.token_types or None))
        named += [(key, spec.get(key)) for spec in (*layers, *others, config.position) for key in SIDES]
        if config.position["name"] == "learned":
            named.append(("max_context", config.position.get("max_context")))
        if config.position["name"] == "t5":
            named.append(("buckets", config.position.get("buckets")))
        for name, value in named:
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"the config says {name}={shown(value)}; it must be a whole number from 1")
            if value is not None and value > side:
                raise ValueError(f"the config says {name}={value}, but no tensor has a side above {side}")


def _check_memory(like: Mapping[str, Tensor], dtype: torch.dtype, memory_bytes: int | None) -> None:
    """Raise if the weights, and the largest of them once more while it is converted, do not fit."""
    counts = [tensor.numel() for tensor in like.values()]
    needed = (sum(counts) + max(counts)) * dtype.itemsize
    if memory_bytes is not None and needed > memory_bytes:
        half = f"; dtype=bfloat16 needs {needed // dtype.itemsize * 2:,}" if dtype.itemsize > 2 else ""
        raise ValueError(
            f"{sum(counts):,} weights in {_word(dtype)} need {needed:,} bytes of memory, "
            f"{memory_bytes:,} are available{half}"
        )


def read_tokenizer(path: Path, gguf: GGUF | None) -> Tokenizer | None:
    """The tokenizer in a model's folder or GGUF file; None if there is none."""
    if gguf is not None:
        return Tokenizer.from_gguf(gguf) if "tokenizer.ggml.model" in gguf.metadata else None
    return Tokenizer.from_directory(path) if (path / "tokenizer.json").is_file() else None


def _special(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of special tokens as Hugging Face configs state them."""
    if tokenizer is None:
        return {}
    ends = sorted(tokenizer.eos)
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad,
    }
