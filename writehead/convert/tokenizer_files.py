"""What the files beside tokenizer.json say: named tokens, ids that end a text, the chat template."""

from pathlib import Path
from typing import Any

from writehead.convert.errors import BadFile, file_size, shown
from writehead.convert.strict_json import read_json

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
CONFIG = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 2**20


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def named_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token and its like: tokenizer_config.json's, else special_tokens_map.json's."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", CONFIG):
        given = optional_json(folder / file)
        for name in NAMED:
            if (token := given.get(name)) is None:
                continue
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise BadFile(folder / file, f"{name} is {shown(token)}; expected a string")
            found[name] = text
    return found


def eos_ids(folder: Path) -> list[int] | None:
    """The ids that end a text by generation_config.json, else config.json; None if neither says."""
    for file in ("generation_config.json", "config.json"):
        given = optional_json(folder / file).get("eos_token_id")
        if given is None:
            continue
        ids = given if isinstance(given, list) else [given]
        if not all(type(number) is int for number in ids):
            raise BadFile(folder / file, f"eos_token_id is {shown(given)}; expected an id or a list of ids")
        return ids
    return None


def flag(folder: Path, name: str) -> bool | None:
    """A switch of tokenizer_config.json; None if it is not there."""
    given = optional_json(folder / CONFIG).get(name)
    if given is not None and not isinstance(given, bool):
        raise BadFile(folder / CONFIG, f"{name} is {shown(given)}; expected true or false")
    return given


def chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the (default) template of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        if (size := file_size(path)) > MAX_TEMPLATE_BYTES:
            raise BadFile(path, f"is {size} bytes; at most {MAX_TEMPLATE_BYTES} are read")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(path, f"is not UTF-8 text (byte {error.start})") from error
    given = optional_json(folder / CONFIG).get("chat_template")
    if isinstance(given, list):
        named = [item for item in given if isinstance(item, dict) and item.get("name") == "default"]
        given = named[0].get("template") if named else given
    if given is not None and not isinstance(given, str):
        raise BadFile(
            folder / CONFIG, f"chat_template is {shown(given)}; expected a string or a list with a default"
        )
    return given
