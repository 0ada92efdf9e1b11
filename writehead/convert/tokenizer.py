"""Text to token ids and back: a thin face over the `tokenizers` package that knows single tokens' bytes."""

import builtins
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers as tk
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from writehead.convert.errors import BadFile, file_size, shown
from writehead.convert.spelling import BYTES, Spelling
from writehead.convert.tokenizer_files import NAMED, chat_template, eos_ids, flag, named_tokens, optional_json
from writehead.convert.tokenizer_gguf import core_from_gguf, pre_tokenizer, rust_errors, typed
from writehead.convert.writing import replacing, write_json

if TYPE_CHECKING:
    from writehead.convert.gguf import GGUF

MAX_TOKENIZER_BYTES = 2**28
PROBES = ("a", "0", ".", " ", "\n")


class Tokenizer:
    """Encodes and decodes text, renders chats, and names the tokens that begin and end one.

    Args:
        core: a byte-level or SentencePiece-like tokenizer of the `tokenizers` package.
        special: texts of the named tokens (bos_token, eos_token, pad_token, unk_token).
        eos: ids that end a text; the eos_token's own unless given.
        add_bos: whether `encode` begins with bos; None leaves it to the core's post-processor.
        add_eos: the same for the end.
        template: of the chat, jinja2 text.

    Raises:
        ValueError: a named token is not in the vocabulary, or the decoder is of another kind.
    """

    def __init__(
        self,
        core: tk.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        eos: Iterable[int] | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        template: str | None = None,
    ) -> None:
        self.core, self.special, self.template = core, dict(special or {}), template
        self.add_bos, self.add_eos = add_bos, add_eos
        self.vocab: int = max([*core.get_vocab().values(), -1]) + 1
        self._spelling = Spelling(core)
        self.bos: int | None = self._named("bos_token")
        self.pad: int | None = self._named("pad_token")
        end = self._named("eos_token")
        self.eos: frozenset[int] = frozenset(eos if eos is not None else () if end is None else (end,))
        if outside := [number for number in self.eos if not 0 <= number < self.vocab]:
            raise ValueError(f"eos id {outside[0]} is outside the vocabulary of {self.vocab} tokens")
        self._first, self._last = self._frame(end)

    @classmethod
    def from_directory(cls, directory: Path | str) -> "Tokenizer":
        """Read tokenizer.json and what the files beside it say of special tokens and the chat template.

        The ids that end a text come from generation_config.json, else config.json, else the eos_token.

        Raises:
            BadFile: tokenizer.json is missing or malformed, or a file beside it contradicts it.
        """
        folder = Path(directory)
        path = folder / "tokenizer.json"
        if (size := file_size(path)) > MAX_TOKENIZER_BYTES:
            raise BadFile(path, f"is {size} bytes; at most {MAX_TOKENIZER_BYTES} are read")
        with rust_errors(path, "is no tokenizer"):
            core = tk.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            core.no_truncation()
            core.no_padding()
            return cls(
                core,
                special=named_tokens(folder),
                eos=eos_ids(folder),
                add_bos=flag(folder, "add_bos_token"),
                add_eos=flag(folder, "add_eos_token"),
                template=chat_template(folder),
            )

    @classmethod
    def from_gguf(cls, gguf: "GGUF") -> "Tokenizer":
        """Build the tokenizer a GGUF file carries.

        Raises:
            BadFile: no tokenizer, one of another kind, or one that contradicts itself.
        """
        core = core_from_gguf(gguf)
        ids = {key: _gguf_id(gguf, key, core) for key in ("bos", "eos", "padding", "unknown", "eot", "eom")}
        named = zip(NAMED, ("bos", "eos", "padding", "unknown"), strict=True)
        special = {name: str(core.id_to_token(n)) for name, key in named if (n := ids[key]) is not None}
        # what a file leaves open is what llama.cpp does for this kind
        kind = gguf.metadata["tokenizer.ggml.model"]
        usual = "bos_token" in special and (kind == "llama" or pre_tokenizer(gguf) == "llama-bpe")
        with rust_errors(gguf.path, "the tokenizer cannot be built"):
            return cls(
                core,
                special=special,
                eos=[number for key in ("eos", "eot", "eom") if (number := ids[key]) is not None],
                add_bos=typed(gguf, "tokenizer.ggml.add_bos_token", bool, usual),
                add_eos=typed(gguf, "tokenizer.ggml.add_eos_token", bool, False),
                template=typed(gguf, "tokenizer.chat_template", str, None),
            )

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """One token for each byte (its id is the byte), then <|bos|>, <|eos|> and <|pad|>; needs no file."""
        core = tk.Tokenizer(models.BPE(BYTES, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
        core.add_special_tokens([AddedToken(text, normalized=False) for text in special.values()])
        return cls(core, special=special)

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Token ids of a text; special tokens written in it become themselves.

        Args:
            text: any text.
            bos: begin with the bos token; None does what the model's own files say.

        Raises:
            ValueError: bos is asked for and there is none, or the text is no valid Unicode.
        """
        ids = self._plain(text)
        if bos is None:
            return [*self._first, *ids, *self._last]
        if not bos:
            return [*ids, *self._last]
        if self.bos is None:
            raise ValueError("bos=True, but this tokenizer has no bos token; give bos=False or None")
        return [self.bos, *ids, *self._last]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        known = [self._checked(number) for number in ids]
        return self._spelling.text(
            [number for number in known if not (skip_special and self.is_special(number))]
        )

    def token_bytes(self, number: int) -> builtins.bytes:
        """The bytes one token stands for; those of a text are their concatenation.

        A SentencePiece text has one space more in front, which `decode` takes away (see `strips_space`).

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        return self._spelling.token(self._checked(number))

    @property
    def strips_space(self) -> bool:
        """Whether `decode` drops one space at the start of a text."""
        return self._spelling.strips_space

    def is_special(self, number: int) -> bool:
        """Whether a token is a control token, which `decode` leaves out."""
        added = self._spelling.added
        return number in added and added[number].special

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for messages; it holds its special tokens already, so encode it with `bos=False`.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self.template is None:
            raise ValueError("this model has no chat template; give it plain text")
        from writehead.convert.chat import render_chat  # jinja2 is for chats only

        return render_chat(self.template, messages, self.special, add_generation_prompt=add_generation_prompt)

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json, and the special ids into generation_config.json."""
        folder = Path(directory)
        with replacing(folder / "tokenizer.json") as temporary:
            temporary.write_text(self.core.to_str(), encoding="utf-8")
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        config["clean_up_tokenization_spaces"] = False
        said = {"add_bos_token": self.add_bos, "add_eos_token": self.add_eos, "chat_template": self.template}
        config |= {key: value for key, value in said.items() if value is not None}
        write_json(folder / "tokenizer_config.json", config)
        ends = sorted(self.eos)
        ids = {
            "bos_token_id": self.bos,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": self.pad,
        }
        kept = {key: value for key, value in ids.items() if value not in (None, [])}
        write_json(folder / "generation_config.json", optional_json(folder / "generation_config.json") | kept)

    def _plain(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.core.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(
                f"{shown(text)} is no text: expected a string without lone surrogates"
            ) from error
        return ids

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.vocab:
            raise ValueError(f"token id {number} is outside the vocabulary of {self.vocab} tokens")
        return number

    def _named(self, name: str) -> int | None:
        if name not in self.special:
            return None
        number: int | None = self.core.token_to_id(self.special[name])
        if number is None:
            raise ValueError(f"{name} {shown(self.special[name])} is not in the vocabulary")
        return number

    def _frame(self, end: int | None) -> tuple[list[int], list[int]]:
        """What `encode` puts before and after a text: what is said, or else what the core itself adds."""
        first, last = self._own_frame()
        for said, number, name in ((self.add_bos, self.bos, "bos"), (self.add_eos, end, "eos")):
            if said and number is None:
                raise ValueError(f"add_{name}_token is set, but there is no {name}_token")
        if self.add_bos is not None:
            first = [self.bos] if self.add_bos and self.bos is not None else []
        if self.add_eos is not None:
            last = [end] if self.add_eos and end is not None else []
        return first, last

    def _own_frame(self) -> tuple[list[int], list[int]]:
        for probe in PROBES:
            plain, full = self._plain(probe), self.core.encode(probe).ids
            for at in range(len(full) - len(plain) + 1 if plain else 0):
                if full[at : at + len(plain)] == plain:
                    return full[:at], full[at + len(plain) :]
        if not full:
            return [], []
        raise ValueError("what the tokenizer's post-processor adds to a text cannot be told")


def _gguf_id(gguf: "GGUF", key: str, core: tk.Tokenizer) -> int | None:
    key = f"tokenizer.ggml.{key}_token_id"
    found = typed(gguf, key, int, None)
    if found is not None and not 0 <= found < core.get_vocab_size():
        raise BadFile(gguf.path, f"{key} is {found}; the vocabulary has {core.get_vocab_size()} tokens")
    return found  # type: ignore[no-any-return]
