"""`writehead systems` and the page that it writes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from writehead.cli import app
from writehead.cli.cards import FIELDS, TABLES, arguments, card
from writehead.cli.systems import page

PAGE = Path(__file__).parents[2] / "docs" / "systems.md"
ROWS = [row for table in TABLES.values() for row in table.values()]
run = CliRunner().invoke


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `writehead systems --markdown > docs/systems.md`"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_system_has_a_whole_card_that_names_its_paper(row: object) -> None:
    title, fields = card(row)  # type: ignore[arg-type]
    assert title.endswith((".", ")"))
    assert tuple(fields) == FIELDS
    assert row.paper in fields["Paper"]  # type: ignore[attr-defined]


def test_json_holds_every_row_with_its_preset() -> None:
    rows = json.loads(run(app, ["systems", "--json"]).stdout)
    assert [row["name"] for row in rows] == [row.name for row in ROWS]
    window = next(row for row in rows if row["name"] == "local_mqa")
    assert window["preset"] == {"kv_heads": 1, "pattern": {"name": "window", "window": 32}}
    assert (window["table"], window["decodes"]) == ("mixers", "O(W)")


@pytest.mark.parametrize("columns", ["60", "140"])
def test_the_table_says_name_cost_growth_paper_and_summary_of_every_row(columns: str) -> None:
    text = run(app, ["systems"], env={"COLUMNS": columns}).stdout
    lines = [line.split() for line in text.splitlines()]
    for row in ROWS:
        [line] = [line for line in lines if line[:1] == [row.name] and row.paper in line]
        assert " ".join([row.cost, row.decodes, row.paper]) in " ".join(line)
        assert " ".join(row.summary.split()[:3]) in text


def test_a_family_can_be_chosen_and_a_wrong_one_is_named() -> None:
    text = run(app, ["systems", "--family", "position"]).stdout
    assert "rotary" in text
    assert "mqa" not in text
    done = run(app, ["systems", "--family", "positon"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: unknown family 'positon'; did you mean 'position'? (accepted: ")


def test_arguments_are_those_that_a_config_may_set() -> None:
    found = {a.name: a for a in arguments(TABLES["mixers"]["mqa"])}
    assert set(found) == {"heads", "kv_heads", "head_dim", "bias", "qk_norm", "pattern", "scale"}
    assert (found["heads"].value, found["kv_heads"].value) == (8, 1)
    assert found["heads"].says == "query heads H."
    assert [a.name for a in arguments(TABLES["positions"]["t5"])] == [
        "buckets",
        "max_distance",
        "bidirectional",
    ]


@pytest.mark.slow
def test_presets_show_their_parameters_beside_the_published_ones() -> None:
    found = {one["name"]: one for one in json.loads(run(app, ["systems", "--presets", "--json"]).stdout)}
    assert found["etc-base"]["published"] == 166_000_000
    assert found["etc-base"]["parameters"] == pytest.approx(166e6, rel=0.01)
    text = run(app, ["systems", "--presets"]).stdout
    assert "etc-large" in text
    assert "exterior encoder" in text
