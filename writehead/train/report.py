"""What a run says: lines or a progress bar on standard error, JSONL and TensorBoard files in its folder."""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from writehead.convert.writing import replacing

LOG = "log.jsonl"


class Reporter:
    """Writes what happens; one that is silent writes nothing at all."""

    def __init__(
        self, out: Path, steps: int, step: int, *, tensorboard: bool = False, silent: bool = False
    ) -> None:
        """Begin, or go on after `step`: log lines of later steps, of a run that was killed, are removed.

        Args:
            out: the run's folder.
            steps: of the whole run.
            step: steps done.
            tensorboard: also write its files.
            silent: this process is not the first.

        Raises:
            ValueError: TensorBoard is asked for and not installed.
        """
        self.out, self.steps, self.silent = out, steps, silent
        self._board: Any = None
        self._began, self._first, self._seen = time.perf_counter(), step, 0
        self._console = Console(stderr=True, highlight=False, emoji=False, markup=False)
        self._bar: Progress | None = None
        if tensorboard and find_spec("tensorboard") is None:
            raise ValueError("report.tensorboard=true needs the package tensorboard: pip install tensorboard")
        if silent:
            return
        _cut(out / LOG, step)
        if tensorboard:
            board = import_module("torch.utils.tensorboard")
            self._board = board.SummaryWriter(str(out / "tensorboard"), purge_step=step or None)
        if sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures of a step to the files."""
        if self.silent:
            return
        path = self.out / LOG
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        except OSError as error:
            error.filename = str(path)  # a full disk does not say which file it was
            raise
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, words: str, line: bool) -> None:
        """Show how far the run is: a bar on a terminal, else a line where `line` says so."""
        if self.silent:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=words)
        elif line:
            done = step - self._first
            left = (time.perf_counter() - self._began) / max(done, 1) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {words}  eta {_clock(left)}")

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.silent:
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """End the bar and the files."""
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()


def memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cut(path: Path, step: int) -> None:
    """Keep the lines of a log up to a step; a last line that was cut off goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("step", step + 1) <= step:
            kept.append(line + os.linesep)
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
