"""Find and load the native library for this processor, and call it."""

import ctypes
import functools
from pathlib import Path

from writehead.core import system
from writehead.native.build import FOLDER, instruction_sets
from writehead.native.structs import Cache, Call, Matrix, Model

VERSION = 4
NEEDS = {
    "avx512": ("avx512f", "avx512_vnni"),
    "avx2": ("avx2",),
    "dotprod": ("asimddp",),
    "neon": (),
    "portable": (),
}


def load(path: Path) -> ctypes.CDLL:
    """Load one library and declare its functions.

    Raises:
        OSError: it cannot be loaded, or speaks another version of the interface.
    """
    library = ctypes.CDLL(str(path))
    library.wh_version.restype = ctypes.c_int32
    if (version := library.wh_version()) != VERSION:
        raise OSError(f"{path} has interface version {version}, not {VERSION}; build it again")
    library.wh_instructions.restype = ctypes.c_char_p
    library.wh_team_create.restype = ctypes.c_void_p
    library.wh_team_create.argtypes = [ctypes.c_int32]
    library.wh_team_free.restype = None
    library.wh_team_free.argtypes = [ctypes.c_void_p]
    where, number, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
    pointer = ctypes.POINTER
    library.wh_linear.restype = number
    library.wh_linear.argtypes = [where, pointer(Matrix), where, number, where]
    library.wh_engine_create.restype = where
    library.wh_engine_create.argtypes = [pointer(Model), number]
    library.wh_engine_free.restype = None
    library.wh_engine_free.argtypes = [where]
    library.wh_step.restype = number
    library.wh_step.argtypes = [where, pointer(Call)]
    library.wh_attend.restype = number
    library.wh_attend.argtypes = [
        *(where, pointer(Cache), number, number, number, number, where, where),
        *(real, number, number, where, where),
    ]
    return library


def runnable() -> list[str]:
    """The instruction sets that this processor can run, best first."""
    has = system.instruction_sets() or {}
    return [name for name in instruction_sets() if all(has.get(need) for need in NEEDS[name])]


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The best library for this processor, or None; and its instruction set, or why there is none."""
    names = runnable()
    for name in names:
        path = FOLDER / f"libwritehead_{name}.so"
        if path.exists():
            try:
                return load(path), name
            except OSError as problem:
                return None, str(problem)
    return None, (
        f"{FOLDER} has no library for {' or '.join(names)}; with a C++ compiler installed, run "
        "python -m writehead.native.build"
    )
