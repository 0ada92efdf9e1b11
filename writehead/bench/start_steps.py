"""The way to a first token step by step, in a process of its own: prints when each part was done.

Usage: python -m writehead.bench.start_steps FOLDER PROMPT solo|torch
"""

import json
import sys
import time
from collections.abc import Iterator
from importlib import import_module


def steps(folder: str, prompt: str, way: str) -> Iterator[str]:
    """Do what the command does, and name each part when it is done."""
    yield "Python"
    if way == "torch":
        import_module("torch")
        yield "PyTorch"
        from writehead.decode.generate import stream
        from writehead.decode.options import Options
        from writehead.engines import open_engine

        yield "our modules"
        there = open_engine(folder)
        assert there.tokenizer is not None
        yield "model and tokenizer"
        ids = there.tokenizer.encode(prompt)
        next(stream(there.engine, [ids], Options(max_new_tokens=1), tokenizer=there.tokenizer))
    else:
        from writehead.decode.options import Options
        from writehead.solo import SoloStream, open_solo

        yield "our modules"
        solo = open_solo(folder)
        if solo is None or solo.tokenizer is None:
            raise SystemExit(f"{folder}: no packed model with tokenizer and outline; convert it again")
        yield "model and tokenizer"
        next(SoloStream(solo, solo.tokenizer.encode(prompt), Options(max_new_tokens=1)))
    yield "prompt and first token"


if __name__ == "__main__":
    print(json.dumps({name: time.monotonic() for name in steps(*sys.argv[1:])}))
