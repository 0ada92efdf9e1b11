"""From the start of a process to a first token: the whole command, and what its time goes into."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writehead.bench.measure import Timing, alternate

PROMPT = "The river that runs through the city has seen all of it, and told none of it. " * 5
WAYS = {
    "solo": (),
    "torch": ("--min-new-tokens", "1"),
}  # the latter is what one plain text needs no torch without


@dataclass(frozen=True)
class Start:
    """One way to a first token.

    Attributes:
        way: "solo", without PyTorch, or "torch".
        timing: of the command, until the first byte of its text.
        stages: median seconds of each part, in a process that does the same step by step; and what is left of
            the command.
    """

    way: str
    timing: Timing
    stages: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return {"way": self.way, "stages_s": self.stages} | self.timing.to_dict()


def measure(
    folder: Path, prompt: str = PROMPT, *, rounds: int = 5, say: Callable[[str], None] = lambda text: None
) -> list[Start]:
    """Measure the ways in turns, each in fresh processes.

    Args:
        folder: of a packed model with a tokenizer.
        prompt: the text.
        rounds: samples of each.
        say: told what comes next.

    Raises:
        ValueError: the command failed; its own message.
    """
    cases = {way: _case(folder, prompt, way) for way in WAYS}
    found = alternate(
        cases, rounds, min_seconds=0, progress=lambda name, at, of: say(f"{name}, {at + 1} of {of}")
    )
    starts = []
    for way, timing in found.items():
        say(f"{way}, step by step")
        parts = [_stages(folder, prompt, way) for _ in range(rounds)]
        stages = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
        stages["the command line"] = timing.median - sum(stages.values())
        starts.append(Start(way, timing, stages))
    return starts


def _case(folder: Path, prompt: str, way: str) -> Callable[[], float]:
    arguments = ("-m", "writehead", "generate", prompt, "--model", str(folder), "--max-new-tokens", "1")

    def run() -> float:
        began = time.perf_counter()
        with _started(*arguments, *WAYS[way]) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - began
            _, said = process.communicate()
        _check(process.returncode, said)
        return seconds

    return run


def _stages(folder: Path, prompt: str, way: str) -> dict[str, float]:
    began = time.monotonic()
    with _started("-m", "writehead.bench.start_steps", str(folder), prompt, way) as process:
        out, said = process.communicate()
    _check(process.returncode, said)
    times = json.loads(out)
    starts = [began, *times.values()]
    return {name: end - start for (name, end), start in zip(times.items(), starts, strict=False)}


def _started(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _check(code: int, said: bytes) -> None:
    if code:
        raise ValueError(f"a first token failed: {said.decode(errors='replace').strip()}")
