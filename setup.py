"""Installation compiles the native engine where there is a compiler; without one PyTorch runs every model."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PARTS = runpy.run_path(str(Path(__file__).parent / "writehead" / "native" / "build.py"))


class BuildPy(build_py):
    """Compiles once the Python files are there; an editable installation has its libraries in the source."""

    def run(self) -> None:
        super().run()
        root = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        try:
            PARTS["build"](root / "writehead" / "native", say=lambda text: print(text, file=sys.stderr))
        except (RuntimeError, OSError) as problem:
            if os.environ.get("WRITEHEAD_NATIVE_REQUIRED"):
                raise
            print(
                f"the native engine was not built; PyTorch will run every model: {problem}", file=sys.stderr
            )


class Platform(Distribution):
    """A distribution with machine code in it, although setuptools compiles nothing itself."""

    def has_ext_modules(self) -> bool:
        return PARTS["compiler"]() is not None


class BdistWheel(bdist_wheel):
    """A wheel for this kind of machine, but for any Python: the libraries know nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def main() -> Any:
    return setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=Platform)


main()
