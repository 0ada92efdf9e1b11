"""Building the libraries: with a compiler, with a bad one, with none; and what installation makes of each."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import writehead
from writehead.native import build as building
from writehead.native.build import build, compiler, instruction_sets, main

ROOT = Path(writehead.__file__).parents[1]
COMPILER = pytest.mark.skipif(compiler() is None, reason="no C++ compiler is installed")
GOOD = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small source in place of the engine's."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "one.cpp").write_text(GOOD)
    monkeypatch.setattr(building, "SOURCES", folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@COMPILER
def test_each_instruction_set_gets_a_library_and_nothing_else_is_left(sources: Path, out: Path) -> None:
    said: list[str] = []
    found = build(out, say=said.append)
    assert found == sorted(out / f"libwritehead_{name}.so" for name in instruction_sets())
    assert sorted(out.iterdir()) == found
    assert sorted(said) == [str(path) for path in found]
    assert all(os.access(path, os.X_OK) for path in found)


@COMPILER
def test_libraries_newer_than_the_sources_are_kept(sources: Path, out: Path) -> None:
    (first,) = build(out, only=["portable"], say=lambda text: None)
    before = first.stat().st_mtime_ns
    build(out, only=["portable"], say=lambda text: None)
    assert first.stat().st_mtime_ns == before
    os.utime(sources / "one.cpp", (first.stat().st_mtime + 5, first.stat().st_mtime + 5))
    build(out, only=["portable"], say=lambda text: None)
    assert first.stat().st_mtime_ns > before


@COMPILER
def test_a_source_that_does_not_compile_is_shown_and_leaves_no_file(sources: Path, out: Path) -> None:
    (sources / "one.cpp").write_text("int answer() { return fortytwo; }")
    with pytest.raises(RuntimeError, match=r"portable: .* failed:\n(.|\n)*fortytwo"):
        build(out, only=["portable"])
    assert not list(out.iterdir())


@COMPILER
def test_an_instruction_set_that_the_compiler_lacks_is_left_out(
    sources: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"strange": ("-mno-such-thing",), "portable": ()}
    monkeypatch.setattr(building, "instruction_sets", lambda: sets)
    said: list[str] = []
    assert build(out, say=said.append) == [out / "libwritehead_portable.so"]
    assert any(text.startswith("left out: strange: ") for text in said)


def test_without_a_compiler_building_says_what_was_looked_for(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(out))
    assert main(["--out", str(out)]) == 1
    assert capsys.readouterr().err == "no C++ compiler found; looked for c++, g++, clang++\n"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found; looked for no-such-compiler"):
        build(out)


def tree(tmp_path: Path) -> Path:
    """The files that an installation starts from."""
    copy = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "writehead", copy / "writehead", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def wheel(copy: Path, **environment: Any) -> tuple[str, list[str], str]:
    """The name of the wheel that the tree gives, the native files in it, and what was said."""
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=copy,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    names = zipfile.ZipFile(path).namelist()
    return path.name, [name for name in names if name.startswith("writehead/native/")], done.stderr


@pytest.mark.slow
def test_a_wheel_is_built_without_a_compiler_and_holds_the_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    name, held, said = wheel(tree(tmp_path), PATH=str(tmp_path / "empty"), CXX="")
    assert name.endswith("-py3-none-any.whl")
    assert "the native engine was not built; PyTorch will run every model: no C++ compiler found" in said
    assert not [one for one in held if one.endswith(".so")]
    assert {"writehead/native/library.py", "writehead/native/src/writehead.h"} <= set(held)
    sources = {f"writehead/native/src/{path.name}" for path in (ROOT / "writehead/native/src").iterdir()}
    assert sources <= set(held)


@COMPILER
@pytest.mark.slow
def test_a_wheel_built_with_a_compiler_holds_its_libraries_and_names_the_platform(tmp_path: Path) -> None:
    copy = tree(tmp_path)
    for path in (copy / "writehead/native/src").iterdir():
        path.unlink()
    (copy / "writehead/native/src/one.cpp").write_text(GOOD)  # the engine itself takes a minute
    name, held, _ = wheel(copy)
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    libraries = {f"writehead/native/libwritehead_{one}.so" for one in instruction_sets()}
    assert libraries <= set(held)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "g++", "clang++"])
def test_pip_installs_with_each_compiler_and_without_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    if name and not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    copy, target, empty = tree(tmp_path), tmp_path / "target", tmp_path / "empty"
    for path in (copy / "writehead/native/src").iterdir():
        path.unlink()
    (copy / "writehead/native/src/one.cpp").write_text(GOOD)  # the engine itself takes a minute
    empty.mkdir()
    hidden = {"CXX": name} if name else {"CXX": "", "PATH": str(empty)}
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", str(copy), *options],
        cwd=tmp_path,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    libraries = {path.name for path in (target / "writehead/native").glob("*.so")}
    assert libraries == ({f"libwritehead_{one}.so" for one in instruction_sets()} if name else set())
    assert (target / "writehead/native/library.py").exists()


@COMPILER
@pytest.mark.slow
def test_a_source_that_fails_does_not_stop_an_installation_unless_it_must_not(tmp_path: Path) -> None:
    copy = tree(tmp_path)
    for path in (copy / "writehead/native/src").glob("*.cpp"):
        path.write_text("broken")
    _, _, said = wheel(copy)
    assert "the native engine was not built" in said
    assert "failed:" in said
    command = [sys.executable, "setup.py", "-q", "build_py"]
    strict = subprocess.run(
        command,
        cwd=copy,
        env=os.environ | {"WRITEHEAD_NATIVE_REQUIRED": "1"},
        capture_output=True,
        timeout=300,
    )
    assert strict.returncode != 0
