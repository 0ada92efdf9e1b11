"""Answers requests for one engine: a line of JSON on stdout for each on stdin."""

import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

PACKAGE = "writehead.bench.peer_engines"
OPERATIONS = ("dequantise", "prepare", "load", "prefill", "decode", "greedy", "score")


def answer(engine: Any, op: str, args: dict[str, Any]) -> Any:
    """Carry out one request."""
    if op == "version":
        return importlib.metadata.version(engine.package)
    if op not in OPERATIONS or not hasattr(engine, op):
        raise ValueError(f"{engine.package} has no operation {op!r}")
    return getattr(engine, op)(**args)


def engines() -> dict[str, type[Any]]:
    """The table of this folder, found without the rest of writehead, which an engine's Python may not hold.

    The folder itself stands on no module path: its file names would hide the engines' packages.
    """
    for name, folder in (("writehead", []), ("writehead.bench", []), (PACKAGE, [str(Path(__file__).parent)])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = folder
    spec = importlib.util.spec_from_file_location(PACKAGE, Path(__file__).with_name("__init__.py"))
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(sys.modules[PACKAGE])
    table: dict[str, type[Any]] = sys.modules[PACKAGE].ENGINES
    return table


def main(name: str) -> None:
    """Answer requests from stdin until "quit" or its end; whatever engines print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        engine = engines()[name]()
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "quit":
                break
            try:
                reply = {"ok": answer(engine, request["op"], request["args"])}
            except Exception as problem:
                text = " ".join(str(problem).split())[:500]
                reply = {"error": f"{type(problem).__name__}: {text}"}
            out.write(json.dumps(reply) + "\n")
            out.flush()
        del engine
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
