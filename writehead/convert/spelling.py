"""What bytes each token stands for: byte-level BPE and SentencePiece spell them differently."""

import json
import re
from typing import Any

import tokenizers as tk

SPACE_MARK = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones stand for themselves, the others for 256 and up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()


class Spelling:
    """The bytes of single tokens, and whether a decoded text has a space too many in front.

    Raises:
        ValueError: the tokenizer decodes in a way that gives single tokens no bytes of their own.
    """

    def __init__(self, core: tk.Tokenizer) -> None:
        self.core, self.added = core, core.get_added_tokens_decoder()
        # the parts' own state is JSON; the whole tokenizer's would spell out its vocabulary
        steps = _flat(json.loads(core.decoder.__getstate__()) if core.decoder else None)
        kinds = {step["type"] for step in steps}
        self.byte_level = "ByteLevel" in kinds
        if not self.byte_level and not any(_marks_spaces(step) for step in steps):
            raise ValueError(
                f"the tokenizer's decoder is {', '.join(sorted(kinds)) or 'absent'}; "
                "supported: ByteLevel, Metaspace, and SentencePiece's sequence"
            )
        self.byte_tokens = "ByteFallback" in kinds or bool(getattr(core.model, "byte_fallback", False))
        self.strips_space = not self.byte_level and any(_strips(step) for step in steps)

    def token(self, number: int) -> bytes:
        """The bytes of one token of the vocabulary; none for an unused id."""
        piece = self.core.id_to_token(number) or ""
        if self.byte_level:
            if number in self.added or not all(char in BYTES for char in piece):
                return piece.encode()
            return bytes(BYTES[char] for char in piece)
        if self.byte_tokens and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace(SPACE_MARK, " ").encode()

    def text(self, numbers: list[int]) -> str:
        """The text of a whole sequence of tokens; bytes that are no UTF-8 become U+FFFD."""
        found = b"".join(map(self.token, numbers))
        if self.strips_space and found.startswith(b" "):
            found = found[1:]
        return found.decode("utf-8", "replace")


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _marks_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == SPACE_MARK)
    return (
        bool(step["type"] == "Replace")
        and step["pattern"] == {"String": SPACE_MARK}
        and step["content"] == " "
    )


def _strips(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] == 1)
