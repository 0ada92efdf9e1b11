"""The command line's frame: verbs by name, errors in one line, exit codes, quiet pipes, no torch for help."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import writehead
from writehead.cli import VERBS, Verb, app, errors, main

ROOT = Path(__file__).parents[2]
WRITTEN = [name for name, verb in VERBS.items() if importlib.util.find_spec(verb.target.partition(":")[0])]
run = CliRunner().invoke


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `writehead act` do what a test gives."""

    def put(action: Any) -> None:
        def command(word: str = "") -> None:
            action()

        module = type(sys)("acting")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "acting", module)
        monkeypatch.setitem(VERBS, "act", Verb("acting:command", "Act."))

    return put


def raises(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], *([name, "--help"] for name in WRITTEN)]
)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom writehead.cli import app\ntry:\n"
        f"    app({arguments!r}, prog_name='writehead')\nexcept SystemExit as end:\n"
        "    assert end.code == 0, end.code\nassert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "writehead" in done.stdout


def test_importing_the_package_imports_no_torch() -> None:
    done = python("-c", "import sys, writehead; dir(writehead); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0


def test_every_public_name_is_there_and_no_other() -> None:
    for name in writehead.__all__:
        assert getattr(writehead, name) is not None
    assert set(writehead.__all__) == set(writehead._HOME) | {"__version__"}
    assert dir(writehead) == sorted(writehead.__all__)
    with pytest.raises(AttributeError, match="module 'writehead' has no attribute 'Decodr'"):
        writehead.Decodr  # noqa: B018


def test_help_lists_every_verb() -> None:
    done = run(app, ["--help"])
    assert done.exit_code == 0
    for name, one in VERBS.items():
        assert f" {name} " in done.stdout
        assert one.help in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "error: unknown verb 'shwo'; did you mean 'show'? (accepted: "),
        (["--verison"], "error: No such option: --verison (did you mean: --version); see writehead --help"),
        (["systems", "--familiy", "x"], "(did you mean: --family); see writehead systems --help"),
        (["show"], "error: Missing argument 'name'; see writehead show --help"),
        (["plan", "x", "--dtype", "int3"], "'int3' is not one of 'float32', 'bfloat16', 'float16'; see"),
        (["plan", "x", "--context", "many"], "error: Invalid value for '--context': "),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run(app, arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("a=1 must\nbe 2"), 1, "error: a=1 must be 2\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.bin"),
            1,
            "error: x.bin: No such file or directory\n",
        ),
        (OSError("disk gone"), 1, "error: disk gone\n"),
        (MemoryError(), 1, "error: out of memory (the system has no more to give)\n"),
        (
            RuntimeError("[x.cpp:1] can't allocate memory: 9 bytes"),
            1,
            "error: out of memory ([x.cpp:1] can't",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (typer.BadParameter("no"), 2, "error: Invalid value: no; see writehead act --help\n"),
        (KeyError("k"), 1, "error: internal: KeyError: 'k' (run again with --debug for the traceback)\n"),
        (ValueError(), 1, "error: internal: ValueError:"),
    ],
)
def test_errors_of_a_verb_are_one_line(verb: Any, error: BaseException, code: int, message: str) -> None:
    verb(raises(error))
    done = run(app, ["act"])
    assert done.exit_code == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "act"], ["act", "--debug"]])
def test_debug_shows_the_traceback_before_or_behind_the_verb(verb: Any, arguments: list[str]) -> None:
    verb(raises(ValueError("broken")))
    done = run(app, arguments)
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("error: broken\n")


def test_debug_behind_a_double_dash_is_an_ordinary_argument() -> None:
    assert errors.take_debug(["--debug", "generate", "--", "--debug"]) == (
        ["generate", "--", "--debug"],
        True,
    )
    assert errors.take_debug(["generate", "--", "--debug"]) == (["generate", "--", "--debug"], False)


def test_a_verb_that_exits_keeps_its_code(verb: Any) -> None:
    verb(raises(typer.Exit(3)))
    assert run(app, ["act"]).exit_code == 3


def test_a_verb_may_be_a_group_of_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    group = typer.Typer()

    @group.command()
    def one() -> None:
        typer.echo("first")

    @group.command()
    def two() -> None:
        typer.echo("second")

    module = type(sys)("acting")
    module.command = group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acting", module)
    monkeypatch.setitem(VERBS, "act", Verb("acting:command", "Act."))
    assert run(app, ["act", "two"]).stdout == "second\n"


def acting(body: str) -> str:
    """A program whose verb `act` is the function `body`."""
    return (
        "import os, signal, sys\nfrom writehead.cli import VERBS, Verb, app\n"
        f"module = type(sys)('acting')\nmodule.command = {body}\n"
        "sys.modules['acting'] = module\nVERBS['act'] = Verb('acting:command', 'Act.')\napp(['act'])\n"
    )


@pytest.mark.parametrize("write", ["print", "__import__('rich').print"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(write: str) -> None:
    code = acting(f"lambda: [{write}('line') for _ in range(100_000)] and None")
    reader = subprocess.Popen(["head", "-n", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert reader.communicate()[0] == "line\n"
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_while_a_verb_runs_is_one_line_and_130() -> None:
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background is deaf
    done = python("-c", heard + acting("lambda: os.kill(os.getpid(), signal.SIGINT)"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_python_m_writehead_is_the_command() -> None:
    done = python("-m", "writehead", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown verb 'nothing' (accepted: ")


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_large_tensors_go_on_huge_pages_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["writehead", "--version"])
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    with pytest.raises(SystemExit):
        main()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == kept
