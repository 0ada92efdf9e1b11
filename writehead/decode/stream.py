"""Token ids in, printable text out: incomplete characters and beginnings of stop strings are held back."""

import codecs
from collections import deque
from collections.abc import Callable, Sequence


class TextStream:
    """Text of one row, released as soon as no later token can change it.

    The pieces add up to the whole: the bytes of all tokens decoded with `errors="replace"`, up to the stop
    string that completes first, or all of it. Of stop strings completed by the same character the longest
    counts. So the text depends on the bytes and not on how tokens cut them, and whether it has ended never
    waits for one more token. Time is linear in the text, whatever the number of stop strings.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        """Start with no text.

        Args:
            token_bytes: the bytes of a token id; may be empty, or part of a character.
            stop: strings that end the text and are not part of it.

        Raises:
            ValueError: `stop` is one string, or holds an empty string or something else than strings.
        """
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._search = _StopSearch(_checked(stop))
        self._held: deque[str] = deque()  # characters not yet released
        self._released: list[str] = []
        self._stopped = False
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has completed; later tokens release nothing."""
        return self._stopped

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._released)

    def push(self, token: int) -> str:
        """Take one token and return the text that became safe to print, often empty.

        Raises:
            ValueError: the stream was finished.
        """
        if self._finished:
            raise ValueError("the stream is finished: start a new TextStream for more tokens")
        if self._stopped:
            return ""
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """Return the rest: text that was held back, and U+FFFD for bytes that never became a character."""
        over = self._finished or self._stopped
        self._finished = True
        return "" if over else self._release(self._decoder.decode(b"", final=True))

    def _release(self, characters: str) -> str:
        completed = 0
        for character in characters:
            self._held.append(character)
            completed = self._search.advance(character)
            if completed:
                self._stopped = True
                break
        keep = completed or (0 if self._finished else self._search.depth)
        piece = "".join(self._held.popleft() for _ in range(len(self._held) - keep))
        self._released.append(piece)
        return piece


def _checked(stop: Sequence[str]) -> Sequence[str]:
    if isinstance(stop, str):
        raise ValueError(f"stop must be a list of strings, and {stop!r} is one string; give [{stop!r}]")
    for string in stop:
        if not isinstance(string, str):
            raise ValueError(f"stop must be a list of strings, and {string!r} is not a string")
        if not string:
            raise ValueError(
                "a stop string must have at least one character; an empty one would stop before any text"
            )
    return stop


class _StopSearch:
    """Aho and Corasick's automaton (1975): all stop strings matched at once, one character at a time."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # characters of the prefix that a node stands for
        self._completes = [0]  # length of the longest stop string that ends here
        for string in stop:
            node = 0
            for character in string:
                node = self._child(node, character)
            self._completes[node] = len(string)
        self._fall = [0] * len(self._next)  # node of the longest proper suffix that also begins a stop string
        self._link()
        self._node = 0

    @property
    def depth(self) -> int:
        """Length of the longest suffix of the text that begins some stop string."""
        return self._depth[self._node]

    def advance(self, character: str) -> int:
        """Take a character; the length of the longest stop string it completes, 0 for none."""
        self._node = self._follow(self._node, character)
        return self._completes[self._node]

    def _child(self, node: int, character: str) -> int:
        child = self._next[node].setdefault(character, len(self._next))
        if child == len(self._next):
            self._next.append({})
            self._depth.append(self._depth[node] + 1)
            self._completes.append(0)
        return child

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for character, child in self._next[node].items():
                self._fall[child] = self._follow(self._fall[node], character)
                self._completes[child] = self._completes[child] or self._completes[self._fall[child]]
                queue.append(child)

    def _follow(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fall[node]
        return self._next[node].get(character, 0)
