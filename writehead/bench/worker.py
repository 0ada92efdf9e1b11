"""A competitor in a process of its own, so that its threads, memory and crashes stay away from the others."""

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

LINES_KEPT = 20  # of a failed worker's stderr


class CaseError(RuntimeError):
    """A case could not run; its row carries this message and the other cases go on."""


class Worker:
    """A peer in a process of its own, which answers one line of JSON on stdout for each line on stdin.

    A request is {"op": name, "args": {...}}, its answer {"ok": value} or {"error": text}. "quit" ends it.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `command`; `environment` is added to this process's own.

        Raises:
            CaseError: the command cannot be started.
        """
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads would block the child
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, **(environment or {})},
                text=True,
                start_new_session=True,  # Ctrl-C reaches the bench alone, which then closes its workers
            )
        except OSError as problem:
            self._stderr.close()
            raise CaseError(f"{name}: cannot start {command[0]}: {problem.strerror}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stdout:
            self._answers.put(line)
        self._answers.put(None)

    def call(self, op: str, timeout_s: float = 600.0, **args: Any) -> Any:
        """Ask for one operation and wait for its answer.

        Args:
            op: name of the operation.
            timeout_s: seconds to wait; a worker that takes longer is ended.
            args: arguments of the operation, as JSON has them.

        Returns:
            The answer.

        Raises:
            CaseError: the operation failed, the worker died or took too long; with the end of its stderr.
        """
        if self._process.poll() is not None:
            raise CaseError(self._died(op))
        try:
            self._stdin.write(json.dumps({"op": op, "args": args}) + "\n")
            self._stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._end()
            raise CaseError(f"{self.name}: {op} took longer than {timeout_s:g} s and was ended") from None
        except BrokenPipeError:
            line = None
        except KeyboardInterrupt:
            self._end()  # its answer would otherwise be taken for that of the next request
            raise
        if line is None:
            self._end()
            raise CaseError(self._died(op))
        try:
            answer = json.loads(line)
        except ValueError:
            self._end()
            raise CaseError(f"{self.name}: {op} answered {line.strip()[:80]!r}, not JSON") from None
        if "error" in answer:
            raise CaseError(f"{self.name}: {op}: {answer['error']}")
        return answer["ok"]

    def _died(self, op: str) -> str:
        return f"{self.name}: ended with code {self._process.poll()} in {op}: {self.stderr() or 'no message'}"

    def stderr(self) -> str:
        """The last lines that the worker wrote to stderr."""
        if self._stderr.closed:
            return ""
        handle = self._stderr.fileno()
        size = os.fstat(handle).st_size
        text = os.pread(handle, 8192, max(0, size - 8192))  # a seek would move the child's place as well
        return "\n".join(text.decode(errors="replace").strip().splitlines()[-LINES_KEPT:])

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def close(self, timeout_s: float = 10.0) -> None:
        """Ask the worker to quit, end it if it does not within `timeout_s`; harmless when called again."""
        if self._process.poll() is None:
            try:
                self._stdin.write(json.dumps({"op": "quit", "args": {}}) + "\n")
                self._stdin.flush()
                self._process.wait(timeout_s)
            except (subprocess.TimeoutExpired, OSError):
                self._end()
        self._reader.join(timeout_s)
        with suppress(BrokenPipeError):  # a request that never went out
            self._stdin.close()
        self._stdout.close()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
