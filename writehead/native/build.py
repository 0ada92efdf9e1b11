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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

Say: TypeAlias = Callable[[str], object]

SOURCES = Path(__file__).parent / "src"
FOLDER = Path(os.environ.get("WRITEHEAD_NATIVE") or SOURCES.parent)  # where the libraries are, or will be
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
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
    changed = max(path.stat().st_mtime for path in (*SOURCES.iterdir(), Path(__file__)))
    built, failed = [], []
    wanted = {name: flags for name, flags in instruction_sets().items() if not only or name in only}
    with tempfile.TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as pool:
        making = {}
        for name, flags in wanted.items():
            target = folder / f"libwritehead_{name}.so"
            if target.exists() and target.stat().st_mtime >= changed and not extra:
                built.append(target)
                continue
            call = [command, *FLAGS, *flags, *extra]
            making[name] = target, call, _objects(pool, call, Path(objects) / name)
        for name, (target, call, parts) in making.items():
            try:
                said = [part.result() for part in parts.values()]
                said.append(_link([*call, "-shared", *map(str, parts)], target))
            except RuntimeError as error:
                failed.append(f"{name}: {error}")
                continue
            say("\n".join([str(target), *filter(None, said)]))
            built.append(target)
    if not built:
        raise RuntimeError("\n".join(failed))
    for problem in failed:
        say(f"left out: {problem}")
    return sorted(built)


def _objects(pool: ThreadPoolExecutor, call: Sequence[str], folder: Path) -> dict[Path, Future[str]]:
    """Compile each source on its own, so that as many processors as there are take part."""
    folder.mkdir()
    found = {}
    for source in sorted(SOURCES.glob("*.cpp")):
        made = folder / f"{source.stem}.o"
        found[made] = pool.submit(_run, [*call, "-c", str(source), "-o", str(made)])
    return found


def _link(call: Sequence[str], target: Path) -> str:
    """Make the library whole or not at all: the compiler's warnings."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        said = _run([*call, "-o", temporary])
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return said


def _run(call: Sequence[str]) -> str:
    """Run the compiler: its warnings."""
    run = subprocess.run(call, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{call[0]} failed:\n{run.stderr.strip()}")
    return run.stderr.strip()


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
