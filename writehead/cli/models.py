"""The model that a command's argument names, as a config: no weight is read."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from writehead.config import ModelConfig


def config_of(name: str) -> "ModelConfig":
    """The config of a model.

    Args:
        name: "smollm2", a preset, a folder with a config.json (ours or Hugging Face's), a config as JSON or
            YAML, or a FILE.gguf, of which only the header is read.

    Raises:
        ValueError: no such model, or a file that does not describe one; the message names it.
    """
    from writehead.convert.find import find
    from writehead.convert.gguf import open_gguf
    from writehead.convert.gguf_llama import read_config
    from writehead.convert.strict_json import read_json
    from writehead.presets import PRESETS

    path = Path(name)
    if name in PRESETS and not path.exists():
        return PRESETS[name].config
    if path.suffix in (".yaml", ".yml") and path.exists():
        return _ours(path)
    if path.suffix == ".json" and path.exists():
        return _theirs(path) if "model_type" in read_json(path) else _ours(path)
    found = find(name)
    if (found / "config.json").is_file():
        path = found / "config.json"
        return _theirs(path) if "model_type" in read_json(path) else _ours(path)
    if found.is_dir():
        raise ValueError(f"{found} is not a model folder: it has no config.json")
    return read_config(open_gguf(found))[1]


def decoder_start(source: Path, pad: int | None) -> int | None:
    """The token that a translation's decoder starts from: what a checkpoint's config.json says, else padding.

    Raises:
        ValueError: a config.json that says something else than a token.
    """
    from writehead.convert.errors import shown
    from writehead.convert.strict_json import read_json

    file = source / "config.json"
    said = read_json(file).get("decoder_start_token_id") if file.is_file() else None
    if said is not None and (type(said) is not int or said < 0):
        raise ValueError(f"{file}: decoder_start_token_id={shown(said)} must be a token")
    return pad if said is None else said


def _ours(path: Path) -> "ModelConfig":
    from writehead.config import ModelConfig

    return ModelConfig.read(path)


def _theirs(path: Path) -> "ModelConfig":
    """A Hugging Face config.json; every key must be one that we can honour."""
    from writehead.convert.errors import BadFile
    from writehead.convert.huggingface import read_config
    from writehead.convert.strict_json import read_json

    try:
        return read_config(read_json(path))[1]
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(path, str(error)) from error
