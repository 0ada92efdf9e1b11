"""The front door of packed models: out of every kind of file, and into a folder that is mapped in no time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile
from writehead.convert.find import find
from writehead.convert.gguf_llama import Decoded
from writehead.convert.load import check_sizes, open_checkpoint, read_tokenizer
from writehead.convert.packed_files import read_packed, write_packed
from writehead.convert.packed_map import is_packed
from writehead.convert.rules import SAME, Checkpoint, Match, make, match_weights, present, sources
from writehead.convert.tokenizer import Tokenizer
from writehead.convert.writing import whole_or_nothing
from writehead.model.blank import blank
from writehead.model.parts import weights
from writehead.native.covers import NotCoveredError, why_not
from writehead.native.formats import STEPS, Packed, Quantised, held, pack, pack_rows, packed
from writehead.native.structs import FORMATS, shapes
from writehead.native.weights import PackedModel, check_format, format_of, in_turns, is_matrix

Parts: TypeAlias = tuple[str, list[tuple[Tensor, Tensor]]]  # a format, and values with scales


@dataclass(frozen=True)
class LoadedPacked:
    """What `load_packed` gives.

    Attributes:
        model: for a `NativeEngine`.
        tokenizer: None if the files hold none.
        source: the folder or file it came from.
    """

    model: PackedModel
    tokenizer: Tokenizer | None
    source: Path

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.model.config


def load_packed(
    name: str | Path, format: str | None = None, *, memory_bytes: int | None = None
) -> LoadedPacked:
    """Load a decoder for the native engine.

    Blocks of a GGUF file that a format holds as they are (Q8_0 and Q4_0 in int8; Q4_0 and Q4_1 in int4, whose
    tables stay in their own blocks too) are not quantised anew.

    Args:
        name: as for `load`, or a folder that `save_packed` made.
        format: one of `native.formats.FORMATS`; default that of the folder, else float32.
        memory_bytes: what may be used; a model that needs more is refused before its weights are read.

    Raises:
        ValueError: no such model, or an argument that is refused.
        NotCoveredError: a model that the native engine does not run.
        BadFile: files that are broken, or hold a model that we do not have.
    """
    path = find(name)
    if path.is_dir() and is_packed(path):
        model = read_packed(path)
        if format is not None and format != model.format:
            raise ValueError(
                f"{path} is saved in {model.format}, not in {format}; leave the type away, or convert what "
                "it was made of"
            )
        return LoadedPacked(model, read_tokenizer(path, None), path)
    try:
        checkpoint, gguf = open_checkpoint(path, torch.float32)
        check_sizes(checkpoint)
        check_format(checkpoint.config, format or FORMATS[0])
        if (reason := why_not(checkpoint.config)) is not None:
            raise NotCoveredError(reason)
        model = _pack(checkpoint, format or FORMATS[0], memory_bytes)
        tokenizer = read_tokenizer(path, gguf)
    except (BadFile, NotCoveredError):
        raise
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    return LoadedPacked(model, tokenizer, path)


def save_packed(
    model: PackedModel,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Save a packed model into a folder, whole or not at all.

    Args:
        model: from `load_packed` or `native.weights.pack_model`.
        directory: the folder to make.
        tokenizer: saved beside the model.
        overwrite: replace a model folder that is there.

    Raises:
        ValueError: a folder that may not be made.
    """
    with whole_or_nothing(directory, overwrite=overwrite) as folder:
        write_packed(folder, model)
        if tokenizer is not None:
            tokenizer.save(folder)


def _pack(checkpoint: Checkpoint, format: str, memory_bytes: int | None) -> PackedModel:
    config, like = checkpoint.config, weights(blank(checkpoint.config))
    _check_memory(like, format, memory_bytes)
    matrices: dict[str, Packed] = {}
    vectors: dict[str, Tensor] = {}
    for name, match in match_weights(checkpoint, like).items():
        if not is_matrix(name):
            vectors[name] = in_turns(config, name, make(match, like[name], checkpoint).float())
            continue
        matrix = _by_rows(checkpoint, name, match, like[name], format)
        if matrix is None:
            rows = in_turns(config, name, make(match, like[name], checkpoint))
            matrix = pack(rows, format_of(name, format))
        matrices[name] = matrix
        if isinstance(checkpoint.theirs, Decoded):
            checkpoint.theirs.file.release()
    return PackedModel(config, format, matrices, vectors)


def _by_rows(checkpoint: Checkpoint, name: str, match: Match, like: Tensor, format: str) -> Packed | None:
    """A matrix that is never whole in its files' type; None if it must be made in another way.

    A GGUF file's blocks are taken as they are if the format holds all of them.
    """
    found, form = sources(match, like, checkpoint), match.rule.form
    if not found:
        return None
    if format not in STEPS:
        plain = form is SAME and in_turns(checkpoint.config, name, like) is like
        return pack_rows(found[0].rows, found[0].n, found[0].k, format) if plain else None
    kind, parts = _blocks(checkpoint, match, name, format) or (format_of(name, format), [])
    if not parts:
        quantised = [Quantised.of(part.rows, part.n, part.k, kind) for part in found]
        if not held(max(part.largest for part in quantised), kind):
            return None
        parts = [(part.values, part.scales) for part in quantised]
    joined = (form.join([part[i] for part in parts], match.heads) for i in (0, 1))
    values, scales = (in_turns(checkpoint.config, name, rows) for rows in joined)
    return packed(kind, len(values), like.shape[1], values, scales)


def _blocks(checkpoint: Checkpoint, match: Match, name: str, format: str) -> Parts | None:
    """The format that holds the blocks of all tensors of a matrix, and their integers and scales."""
    theirs = checkpoint.theirs
    if not isinstance(theirs, Decoded):
        return None
    for kind in dict.fromkeys((format, format_of(name, format))):  # a table's own blocks are better than int8
        parts = [theirs.integers(key, kind) for key in present(match, theirs)]
        whole = [part for part in parts if part is not None]
        if len(whole) == len(parts):
            return kind, whole
    return None


def _check_memory(like: Mapping[str, Tensor], format: str, memory_bytes: int | None) -> None:
    """Raise if the packed weights, and the largest in float32 while it is packed, do not fit."""
    needed = 0
    for name, weight in like.items():
        if is_matrix(name):
            data, scales = shapes(format_of(name, format), *weight.shape)
            width = {"float32": 4, "bfloat16": 2}.get(format_of(name, format), 1)
            needed += torch.Size(data).numel() * width + 2 * torch.Size(scales or (0,)).numel()
        else:
            needed += 4 * weight.numel()
    needed += 4 * max(weight.numel() for weight in like.values())
    if memory_bytes is not None and needed > memory_bytes:
        raise ValueError(
            f"packing into {format} needs {needed:,} bytes of memory, {memory_bytes:,} are available"
        )
