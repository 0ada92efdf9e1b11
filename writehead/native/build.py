"""Compile the native engine, one shared library for each instruction set: `python -m writehead.native.build`."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),  # GCC 12 finds it in its own immintrin.h
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": (*AVX512, "-mavx2", "-mfma", "-mf16c", "-mtune=cascadelake"),
        "avx2": ("-mavx2", "-mfma", "-mf16c", "-mtune=haswell"),
        "portable": (),
    },
    "aarch64": {"neon": ()},
}


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Flags of each instruction set of this kind of processor, best first."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return INSTRUCTIONS.get(machine, {"portable": ()})


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is installed."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def build(folder: Path = FOLDER, *, extra: Sequence[str] = (), only: Sequence[str] = ()) -> list[Path]:
    """Compile the libraries into `folder`.

    Args:
        folder: receives libwritehead_NAME.so for each instruction set.
        extra: further flags.
        only: instruction sets to compile; default all.

    Returns:
        The libraries.

    Raises:
        RuntimeError: no compiler, or it fails; the message holds its output.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(f"no C++ compiler found; looked for {', '.join(COMPILERS)}")
    sources = sorted(str(path) for path in (FOLDER / "src").glob("*.cpp"))
    libraries = []
    for name, flags in instruction_sets().items():
        if only and name not in only:
            continue
        target = folder / f"libwritehead_{name}.so"
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{target.name}.")
        os.close(handle)
        try:
            run = subprocess.run(
                [command, *FLAGS, *flags, *extra, *sources, "-o", temporary], capture_output=True, text=True
            )
            if run.returncode:
                raise RuntimeError(f"{command} failed for {name}:\n{run.stderr.strip()}")
            sys.stderr.write(run.stderr)
            Path(temporary).chmod(0o755)
            Path(temporary).replace(target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        libraries.append(target)
    return libraries


def main(arguments: Sequence[str]) -> int:
    """Build all libraries, with sanitizers if `--sanitize` is given."""
    try:
        for path in build(extra=SANITIZE if "--sanitize" in arguments else ()):
            print(path)
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
