"""Compile the native engine, a shared library for each instruction set: `python -m writehead.native.build`.

Installation runs this file by itself, so it imports nothing but the standard library.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

Say: TypeAlias = Callable[[str], object]

SOURCES = Path(__file__).parent / "src"
FOLDER = Path(os.environ.get("WRITEHEAD_NATIVE") or SOURCES.parent)  # where the libraries are, or will be
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),  # GCC 12 finds it in its own immintrin.h
)
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": (*AVX512, "-mavx2", "-mfma", "-mf16c", "-mtune=cascadelake"),
        "avx2": ("-mavx2", "-mfma", "-mf16c", "-mtune=haswell"),
        "portable": (),
    },
    "aarch64": {"dotprod": ("-march=armv8.2-a+dotprod",), "neon": ()},
}


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Flags of each instruction set of this kind of processor, best first."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return INSTRUCTIONS.get(machine, {"portable": ()})


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is installed."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def build(
    folder: Path = FOLDER, *, extra: Sequence[str] = (), only: Sequence[str] = (), say: Say = print
) -> list[Path]:
    """Compile the libraries into `folder`; those that are newer than the sources are left as they are.

    Args:
        folder: receives libwritehead_NAME.so for each instruction set.
        extra: further flags.
        only: instruction sets to compile; default all.
        say: told of each library that is made or fails.

    Returns:
        The libraries that are there; an instruction set that the compiler does not know has none.

    Raises:
        RuntimeError: no compiler, or it fails for every instruction set; the message holds its output.
    """
    command = compiler()
    if command is None:
        looked = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise RuntimeError(f"no C++ compiler found; looked for {looked}")
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    changed = max(path.stat().st_mtime for path in (*SOURCES.iterdir(), Path(__file__)))
    built, failed = [], []

    def one(name: str, flags: Sequence[str]) -> None:
        target = folder / f"libwritehead_{name}.so"
        if not target.exists() or target.stat().st_mtime < changed or extra:
            try:
                warned = _compile([command, *FLAGS, *flags, *extra, *sources], target)
            except RuntimeError as problem:
                failed.append(f"{name}: {problem}")
                return
            say(f"{target}{warned}")
        built.append(target)

    wanted = {name: flags for name, flags in instruction_sets().items() if not only or name in only}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, wanted, wanted.values()))
    if not built:
        raise RuntimeError("\n".join(failed))
    for problem in failed:
        say(f"left out: {problem}")
    return sorted(built)


def _compile(command: Sequence[str], target: Path) -> str:
    """Run the compiler: its warnings, on lines of their own."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        run = subprocess.run([*command, "-o", temporary], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{run.stderr.strip()}")
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return f"\n{run.stderr.strip()}" if run.stderr.strip() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m writehead.native.build", description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour checks")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write; default %(default)s")
    parser.add_argument("--only", nargs="+", default=(), choices=instruction_sets(), metavar="NAME")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        build(given.out, extra=SANITIZE if given.sanitize else (), only=given.only)
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
