"""Streamed text equals the text of the whole, however tokens cut the bytes, and comes as early as it can."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from writehead.decode.stream import TextStream


def definition(data: bytes, stop: Sequence[str]) -> tuple[str, bool]:
    """The text of the whole, cut before the stop string that completes first, the longest of several."""
    text = data.decode("utf-8", errors="replace")
    for end in range(1, len(text) + 1):
        lengths = [len(s) for s in stop if text[:end].endswith(s)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def streamed(pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[str, bool]:
    stream = TextStream(lambda token: pieces[token], stop)
    parts = [stream.push(token) for token in range(len(pieces))] + [stream.finish()]
    assert stream.text == "".join(parts)
    return stream.text, stream.stopped


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def all_cuts(data: bytes) -> Iterator[list[bytes]]:
    inner = range(1, len(data))
    for n in range(len(data)):
        yield from (cut(data, at) for at in itertools.combinations(inner, n))


def one_and_two_cuts(data: bytes) -> Iterator[list[bytes]]:
    yield [bytes([byte]) for byte in data]
    yield from (cut(data, at) for at in itertools.combinations_with_replacement(range(len(data) + 1), 2))


FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
TEXTS = {
    "ascii": b"plain text",
    "family": FAMILY.encode(),
    "cjk": "写头 ライト".encode(),
    "combining": "e\N{COMBINING ACUTE ACCENT}o\N{COMBINING DIAERESIS}".encode(),
    "lone continuation": b"a\x80\xbfb",
    "cut short then ascii": b"\xf0\x9f\x98x\xe5\x86",
    "overlong and surrogate": b"\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80\xff",
    "ends incomplete": "ok\N{GRINNING FACE}".encode()[:-1],
}


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
def test_any_cutting_of_the_bytes_gives_the_text_of_the_whole(data):
    cuttings = all_cuts(data) if len(data) <= 11 else one_and_two_cuts(data)
    for pieces in cuttings:
        assert streamed(pieces, ()) == (data.decode("utf-8", errors="replace"), False), pieces


def test_every_short_sequence_of_awkward_bytes_decodes_like_the_whole():
    awkward = bytes.fromhex("41 80 90 9f a0 bf c0 c2 e0 e2 ed ef f0 f4 ff")
    for data in map(bytes, itertools.product(awkward, repeat=3)):
        assert streamed(cut(data, (1, 2)), ())[0] == data.decode("utf-8", errors="replace"), data


STOPS = {
    "overlaps itself": ("xaaabyaab", ["aab"]),
    "at the start": ("STOPabc", ["STOP"]),
    "at the end": ("abcSTOP", ["STOP"]),
    "the whole text": ("STOP", ["STOP"]),
    "begun but never finished": ("abcSTO", ["STOP"]),
    "begun, broken off, then finished": ("ab\nabab\nUser", ["ab\nUser"]),
    "a prefix of another": ("say abcd", ["abcd", "ab"]),
    "a suffix of another": ("say abcd", ["cd", "abcd"]),
    "inside another": ("xabcdx", ["abcd", "bc"]),
    "inside another that breaks off": ("xabcx", ["abcd", "c"]),
    "the first of many": ("one two three", ["three", "two", "four"]),
    "the same one twice": ("a.b.c", [".", "."]),
    "of several bytes": ("写头\N{GRINNING FACE}写", ["头\N{GRINNING FACE}"]),
    "joined emoji": (f"a{FAMILY}b", ["\N{ZERO WIDTH JOINER}\N{GIRL}"]),
    "spaces and newlines": ("Q: a\n\n\nQ: b", ["\n\nQ:"]),
}


@pytest.mark.parametrize(("text", "stop"), STOPS.values(), ids=STOPS)
def test_any_cutting_of_text_with_stop_strings_gives_the_definition(text, stop):
    data = text.encode()
    cuttings = all_cuts(data) if len(data) <= 11 else one_and_two_cuts(data)
    for pieces in cuttings:
        assert streamed(pieces, stop) == definition(data, stop), pieces


def test_the_stop_string_that_completes_first_ends_the_text():
    assert streamed([b"xabcd"], ["abcd", "bc"]) == ("xa", True)
    assert streamed([b"xabcd"], ["abcd", "bcd"]) == ("x", True)
    assert streamed([b"xaaab"], ["aab"]) == ("xa", True)


def test_a_stop_string_may_hold_the_replacement_character():
    stop = ["\N{REPLACEMENT CHARACTER}!"]
    for data in (b"ab\xff!c", b"ab\xe5\x86!c"):
        assert streamed([bytes([byte]) for byte in data], stop) == ("ab", True)
    assert streamed([b"ab\xe5"], ["\N{REPLACEMENT CHARACTER}"]) == ("ab", True)  # completed by finish


@given(
    data=st.one_of(st.binary(max_size=24), st.text("abé\N{GRINNING FACE}", max_size=16).map(str.encode)),
    stop=st.lists(
        st.text("abé\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}", min_size=1, max_size=5), max_size=4
    ),
    places=st.lists(st.integers(0, 64), max_size=12),
)
@settings(derandomize=True, max_examples=25, deadline=None)
def test_random_bytes_stops_and_cuts_give_the_definition(data, stop, places):
    assert streamed(cut(data, (p % (len(data) + 1) for p in places)), stop) == definition(data, stop)


@given(
    text=st.text("ab写", max_size=16),
    stop=st.lists(st.text("ab写", min_size=3, max_size=6), min_size=1, max_size=3),
)
@settings(derandomize=True, max_examples=25, deadline=None)
def test_nothing_is_held_back_longer_than_needed(text, stop):
    data = text.encode()
    stream = TextStream(lambda token: data[token : token + 1], stop)
    for n in range(len(data)):
        stream.push(n)
        if stream.stopped:
            break
        decoded = data[: n + 1].decode("utf-8", errors="ignore")  # drops the incomplete end
        held = max(
            k for k in range(len(decoded) + 1) if any(s.startswith(decoded[len(decoded) - k :]) for s in stop)
        )
        assert stream.text == decoded[: len(decoded) - held]


def test_a_character_appears_with_its_last_byte_and_not_before():
    data = "写a".encode()
    stream = TextStream(lambda token: data[token : token + 1], ())
    assert [stream.push(n) for n in range(4)] == ["", "", "写", "a"]


def test_tokens_after_the_stop_string_release_nothing():
    pieces = [b"a<", b"/s>", b"b", b"\xff"]
    stream = TextStream(lambda token: pieces[token], ["</s>"])
    assert [stream.push(n) for n in range(4)] == ["a", "", "", ""]
    assert (stream.finish(), stream.stopped, stream.text) == ("", True, "a")


def test_finish_releases_the_rest_once():
    stream = TextStream(lambda token: b"ab\xe5", ["bc"])
    assert (stream.push(0), stream.push(0)) == ("a", "b\N{REPLACEMENT CHARACTER}a")
    assert (stream.finish(), stream.finish()) == ("b\N{REPLACEMENT CHARACTER}", "")
    assert not stream.stopped
    with pytest.raises(ValueError, match="the stream is finished: start a new TextStream for more tokens"):
        stream.push(0)


def test_a_long_stop_string_that_keeps_almost_completing_takes_linear_time():
    # Rescanning what is held would take 10**10 steps here and the test would not end.
    n = 100_000
    stream = TextStream(lambda token: b"ab"[token : token + 1], ["a" * n + "c", "a" * n + "b"])
    for _ in range(2 * n):
        stream.push(0)
    assert len(stream.text) == n
    assert (stream.push(1), stream.stopped, stream.text) == ("", True, "a" * n)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "a stop string must have at least one character; an empty one would stop before any text"),
        (["a", ""], "a stop string must have at least one character"),
        ("END", r"stop must be a list of strings, and 'END' is one string; give \['END'\]"),
        ([b"END"], "stop must be a list of strings, and b'END' is not a string"),
    ],
)
def test_a_stop_that_cannot_be_honoured_is_refused(stop, message):
    with pytest.raises(ValueError, match=message):
        TextStream(lambda token: b"", stop)
