"""The kernels compiled by other compilers and for other processors: clang, and NEON under an emulator."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import writehead
from writehead.native import build as building
from writehead.native.build import FLAGS, INSTRUCTIONS, SOURCES, build, compiler, instruction_sets
from writehead.native.library import NEEDS

DRIVER = Path(__file__).with_name("kernel_driver.cpp")
PROGRAM = [*(flag for flag in FLAGS if flag != "-O3"), "-O1", f"-I{SOURCES}"]


def driven(command: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    """Compile the driver with the engine's sources into one program."""
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    made = subprocess.run(
        [*command, *PROGRAM, *sources, str(DRIVER), "-o", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr
    return made


def ran(command: list[str], instructions: str) -> None:
    """Run a program of the driver: it says what it was compiled for and that all cases agree."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (said[0], said[-1]) == (instructions, "all equal")
    assert sum(line.startswith("linear format") for line in said) == 60
    assert sum(line.startswith("attention format") for line in said) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neon", "dotprod"])
def test_the_neon_kernels_equal_plain_loops_under_an_emulator(name: str, tmp_path: Path) -> None:
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if cross is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user)")
    driven([cross, *INSTRUCTIONS["aarch64"][name], "-static"], tmp_path / name)
    ran([emulator, "-cpu", "max", str(tmp_path / name)], name)


@pytest.mark.slow
def test_the_portable_kernels_equal_plain_loops(tmp_path: Path) -> None:
    found = compiler()
    if found is None:
        pytest.skip("no C++ compiler is installed")
    driven([found], tmp_path / "plain")
    plain = "neon" if platform.machine() in ("aarch64", "arm64") else "portable"
    ran([str(tmp_path / "plain")], plain)


@pytest.mark.slow
def test_clang_builds_the_engine_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    monkeypatch.setenv("CXX", "clang++")
    best = next(iter(instruction_sets()))
    said: list[str] = []
    (library,) = build(tmp_path, only=[best], extra=("-O1",), say=lambda text: said.append(str(text)))
    assert said == [str(library)]
    assert os.access(library, os.X_OK)


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("x86_64", ["avx512", "avx2", "portable"]),
        ("AMD64", ["avx512", "avx2", "portable"]),
        ("aarch64", ["dotprod", "neon"]),
        ("arm64", ["dotprod", "neon"]),
        ("riscv64", ["portable"]),
    ],
)
def test_each_kind_of_processor_has_its_instruction_sets(
    machine: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building.platform, "machine", lambda: machine)
    assert list(instruction_sets()) == names
    assert set(names) <= NEEDS.keys()


def test_the_driver_is_no_part_of_the_package() -> None:
    assert not list(Path(writehead.__file__).parent.rglob(DRIVER.name))
