"""House rules that a machine can check: cards, the order of rooms, what is never called, a quick --help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import writehead
from writehead.catalog import FEEDFORWARDS, MIXERS, PIXELS, POSITIONS, STACKS, load

ROOT = Path(writehead.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CARD = ("Paper", "Equation", "State", "Cost", "Decodes", "Differs")
MECHANISMS = [
    path
    for room in ("mixers", "positions", "feedforward", "stacks")
    for path in sorted((ROOT / room).glob("[a-z]*.py"))
] + [ROOT / "model" / "pixels.py"]
ROWS = [row for table in (MIXERS, FEEDFORWARDS, POSITIONS, STACKS, PIXELS) for row in table.values()]
# each room may import from the lines above its own, and from itself
ROOMS = (
    ("version",),
    ("core",),
    ("mixer", "catalog", "ops"),
    ("positions", "config", "stack"),
    ("presets",),
    ("mixers", "feedforward"),
    ("stacks",),
    ("model",),
    ("native",),
    ("decode", "convert", "laws"),
    ("costs", "engines", "solo"),
    ("train",),
    ("evaluate",),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),
)
UNSAFE = {
    ("torch", "load"),
    ("torch", "save"),
    *(("yaml", f"{kind}load") for kind in ("", "unsafe_", "full_")),
}
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def imported(path: Path) -> set[str]:
    """The rooms of writehead that a file imports from, at its top or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"writehead.{a.name}" for a in node.names] if node.module == "writehead" else names
        rooms |= {name.split(".")[1] for name in names if name.startswith("writehead.")}
    return rooms


@pytest.mark.parametrize("path", MECHANISMS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_mechanism_begins_with_its_card(path):
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    assert lines[0].endswith(".") or lines[1] == "" or lines[1].endswith(".")
    heads = [
        line.split()[0]
        for line in lines
        if line.split() and line.split()[0] in CARD and not line.startswith(" ")
    ]
    assert tuple(heads) == CARD
    assert all(len(line.split()) > 1 for line in lines if line.split() and line.split()[0] in CARD)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_card_names_the_paper_of_each_of_its_rows(row):
    card = sys.modules[load(row).__module__].__doc__
    assert row.paper in " ".join(card.split())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_rooms_never_import_upper_ones(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported(path):
        assert other == room or RANK[other] < RANK[room], f"{room} imports {other}"


def test_nothing_is_unpickled_evaluated_or_loaded_unsafely():
    forbidden = {"eval", "exec", "compile"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & {m.split(".")[0] for m in modules}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                assert (owner, node.func.attr) not in UNSAFE, f"{path}:{node.lineno}"


def test_no_comment_is_a_note_to_self():
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.partition("#")[2]
            assert not any(mark in words for mark in ("TODO", "FIXME", "XXX", "HACK")), f"{path}:{number}"


def test_constructors_of_mechanisms_have_at_most_eight_options():
    for row in ROWS:
        init = load(row).__init__
        options = init.__kwdefaults__ or {}
        assert len([name for name in options if name != "position"]) <= 8, row.name


def test_help_imports_no_torch():
    code = "import sys, writehead.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0
