"""Data sets of Hugging Face are read as files; the package is optional."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.train.small import TEXT, train, values, write
from writehead.train.corpus import pairs, texts
from writehead.train.hub import fetched

# datasets pickles what it fingerprints, and its pickler warns of pyarrow's types
pytestmark = pytest.mark.filterwarnings("ignore:Cannot (locate|pickle)")
ROWS = [{"label": n % 2, "text": f"number {n} \u00fc", "score": 0.5} for n in range(6)]


@pytest.mark.skipif(find_spec("datasets") is not None, reason="the package datasets is installed")
def test_without_the_package_the_extra_is_named() -> None:
    with pytest.raises(ValueError, match=r"'hf:some/set' needs the package datasets: pip install writehead"):
        list(texts(["hf:some/set"]))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set that was saved on this disk."""
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    both = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", ROWS), ("test", ROWS[:2]))}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "set"))
    return f"hf:{tmp_path / 'set'}"


def test_rows_are_texts_and_pairs(saved: str) -> None:
    assert [t.text for t in texts([saved])] == [row["text"] for row in ROWS]
    assert list(pairs([f"{saved}:test"], ("label", "text"))) == [
        ("0", "number 0 \u00fc"),
        ("1", "number 1 \u00fc"),
    ]


def test_a_set_is_written_once_and_found_again(saved: str, tmp_path: Path) -> None:
    path = fetched(saved)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    before = path.stat().st_mtime_ns
    assert fetched(saved) == path
    assert path.stat().st_mtime_ns == before
    assert fetched(f"{saved}:test") != path


def test_a_split_that_is_not_there_is_one_line(saved: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded: .*nothing") as caught:
        fetched(f"{saved}:nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"is no data set; write hf:NAME"):
        fetched("hf:a:b:c:d")


def test_a_folder_of_data_files_is_a_data_set_and_trains(saved: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write(
        folder,
        "train.jsonl",
        "".join(json.dumps({"text": TEXT[n : n + 400]}) + "\n" for n in range(0, 4000, 400)),
    )
    last = train(values(f"hf:{folder}:train", loop={"steps": 2}), tmp_path / "out")
    assert last.name == "checkpoint-00000002"
