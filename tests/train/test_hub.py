"""Data sets of Hugging Face are read as files: by their card's configs or their names, on the hub or here."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.small import TEXT, train, values, write
from writehead.train import hub
from writehead.train.corpus import pairs, texts
from writehead.train.hub import chosen_files, fetched, parsed

ROWS: list[dict[str, Any]] = [{"label": n % 2, "text": f"number {n} \u00fc"} for n in range(6)]
CARD = """---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: small/part-*.jsonl
  - split: dev
    path: [small/dev.jsonl]
- config_name: large
  data_dir: big
---
# A card
"""


def put(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the hub has it, with its card."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "README.md", CARD)
    for name, rows in (("small/part-1", ROWS[:3]), ("small/part-2", ROWS[3:]), ("small/dev", ROWS[:2])):
        put(folder, f"{name}.jsonl", rows)
    put(folder, "big/train.jsonl", ROWS * 2)
    put(folder, "big/test.jsonl", ROWS[:1])
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_cards_configs_say_which_files_are_a_splits(saved: Path) -> None:
    assert read(fetched(f"hf:{saved}:small:train")) == ROWS
    assert read(fetched(f"hf:{saved}:small:dev")) == ROWS[:2]
    assert read(fetched(f"hf:{saved}:large:train")) == ROWS * 2
    assert read(fetched(f"hf:{saved}:large:test")) == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"name one of its configs: large, small"),
        (":tiny:train", r"it has no config 'tiny' \(it has large, small\)"),
        (":small:test", r"it has no split 'test' \(it has dev, train\)"),
        (":a:b:c", r"is no data set; write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
    ],
)
def test_what_a_data_set_does_not_have_is_one_line(saved: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fetched(f"hf:{saved}{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "config", "split", "expected"),
    [
        (["data/train-00000-of-00002.parquet", "data/test-0.parquet"], None, "test", ["data/test-0.parquet"]),
        (["a.csv", "b.csv", "README.md"], None, "train", ["a.csv", "b.csv"]),
        (["en/valid.json", "de/valid.json", "de/train.json"], "de", "validation", ["de/valid.json"]),
        (
            ["train/data-0.arrow", "train/state.json", "dataset_dict.json"],
            None,
            "train",
            ["train/data-0.arrow"],
        ),
        (["contest.txt", "my_test.txt"], None, "test", ["my_test.txt"]),
    ],
)
def test_without_configs_the_names_of_files_tell_their_split(
    names: list[str], config: str | None, split: str, expected: list[str]
) -> None:
    assert chosen_files(names, [], config, split) == expected


def test_names_have_up_to_three_parts() -> None:
    assert parsed("hf:a/b") == ("a/b", None, "train")
    assert parsed("hf:a/b:test") == ("a/b", None, "test")
    assert parsed("hf:a/b:en:test") == ("a/b", "en", "test")


def test_every_kind_of_file_gives_its_rows(tmp_path: Path) -> None:
    as_text = [{k: str(v) for k, v in row.items()} for row in ROWS]
    for name, delimiter in (("c.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        assert list(hub._rows(tmp_path / name)) == as_text
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write(tmp_path, "l.json", lines)
    write(tmp_path, "a.json", json.dumps(ROWS, indent=1))
    write(tmp_path, "t.txt", "one\n\ntwo\r\n")
    for name in ("z.jsonl.gz", "l.json", "a.json"):
        assert list(hub._rows(tmp_path / name)) == ROWS
    assert list(hub._rows(tmp_path / "t.txt")) == [{"text": "one"}, {"text": "two"}]


def test_parquet_and_arrow_files_give_their_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra datasets")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra datasets")
    table = arrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "train.parquet")
    with (
        arrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file,
        arrow.ipc.new_stream(file, table.schema) as to,
    ):
        to.write_table(table)
    for name in ("train.parquet", "x.arrow"):
        assert list(hub._rows(tmp_path / name)) == ROWS


def test_tables_without_pyarrow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    write(tmp_path, "train.parquet")
    with pytest.raises(ValueError, match=r"parquet files need pyarrow: pip install writehead\[datasets\]"):
        fetched(f"hf:{tmp_path}", tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"no folder some/set, and the hub needs huggingface_hub: pip install"
    ):
        fetched("hf:some/set")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", "[1]\n", r"train.jsonl cannot be read: \[1\] is no row: expected a JSON object"),
        ("train.json", '{"a": 1}\nx\n', r"train.json cannot be read: Expecting value"),
        ("train.csv", "a,b\n1,2\n1,2,3\n", r"row 3 has not as many columns as its header"),
        ("train.csv", "a,b\n1\n", r"row 2 has not as many columns as its header"),
        ("train.txt.gz", "no gzip", r"train.txt.gz cannot be read: Not a gzipped file"),
        ("picture.png", "", r"it has no data files \(.parquet, .*\); it holds picture.png"),
        ("README.md", "---\na: [\n---\n", r"the top of its README.md is no YAML"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        fetched(f"hf:{folder}", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*"))


class Hub:
    """The hub with one data set, as its package gives it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.online, self.asked = folder, True, []  # type: ignore[var-annotated]

    def HfApi(self) -> "Hub":  # noqa: N802 - the name that the package has
        return self

    def list_repo_files(self, name: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        if not self.online or name != "me/set":
            raise OSError(f"404: no {name}\nmore lines")
        return hub._names(self.folder)

    def snapshot_download(
        self, name: str, *, repo_type: str, local_files_only: bool = False, allow_patterns: Any = None
    ) -> str:
        if name != "me/set":
            raise OSError("not here")
        self.asked.append(allow_patterns)
        return str(self.folder)


def test_a_name_is_looked_up_and_only_its_splits_files_are_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Hub(saved)
    monkeypatch.setattr(hub.importlib, "import_module", lambda name: there)
    monkeypatch.setattr(hub, "find_spec", lambda name: True)
    path = fetched("hf:me/set:small:dev")
    assert read(path) == ROWS[:2]
    assert there.asked == [["README.md"], ["small/dev.jsonl"]]
    there.online = False
    assert fetched("hf:me/set:small:dev") == path
    with pytest.raises(ValueError, match=r"'hf:me/other': there is no such folder, .*: 404: no me/other$"):
        fetched("hf:me/other")


def test_rows_are_texts_and_pairs_and_are_written_once(saved: Path) -> None:
    source = f"hf:{saved}:small:train"
    assert [t.text for t in texts([source])] == [row["text"] for row in ROWS]
    assert list(pairs([source], ("label", "text")))[1] == ("1", "number 1 \u00fc")
    path = fetched(source)
    before = path.stat().st_mtime_ns
    assert fetched(source) == path
    assert path.stat().st_mtime_ns == before
    put(saved, "small/part-2.jsonl", ROWS[:1])
    assert read(fetched(source)) == ROWS[:3] + ROWS[:1]


def test_a_data_set_trains_a_model(saved: Path, tmp_path: Path) -> None:
    put(saved, "big/train.jsonl", [{"text": TEXT[n : n + 400]} for n in range(0, 4000, 400)])
    last = train(values(f"hf:{saved}:large:train", loop={"steps": 2}), tmp_path / "out")
    assert last.name == "checkpoint-00000002"
