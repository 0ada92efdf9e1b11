"""Data sets of Hugging Face are read as files; the package is optional."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.train.small import TEXT, train, values, write
from writehead.train.corpus import pairs, texts
from writehead.train.hub import fetched

ROWS = [{"label": n % 2, "text": f"number {n} \u00fc", "score": 0.5} for n in range(6)]


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("writehead.train.hub.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'hf:some/set' needs the package datasets: pip install writehead"):
        list(texts(["hf:some/set"]))


@pytest.mark.parametrize("name", ["hf:", "hf:a:b:c:d", "hf:a::b"])
def test_names_have_up_to_three_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the extra datasets")
    with pytest.raises(ValueError, match=r"is no data set; write hf:NAME, hf:NAME:SPLIT"):
        fetched(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data files that looks like a data set of the hub."""
    if find_spec("datasets") is None:
        pytest.skip("needs the extra datasets")
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "theirs")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "train.jsonl", lines(ROWS))
    write(tmp_path / "set", "test.jsonl", lines(ROWS[:2]))
    return tmp_path / "set"


def test_rows_are_texts_and_pairs(folder: Path) -> None:
    assert [t.text for t in texts([f"hf:{folder}"])] == [row["text"] for row in ROWS]
    assert list(pairs([f"hf:{folder}:test"], ("label", "text"))) == [
        ("0", "number 0 \u00fc"),
        ("1", "number 1 \u00fc"),
    ]


def test_a_split_is_written_once_and_found_again(folder: Path) -> None:
    path = fetched(f"hf:{folder}")
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    before = path.stat().st_mtime_ns
    assert fetched(f"hf:{folder}") == path
    assert path.stat().st_mtime_ns == before
    assert fetched(f"hf:{folder}:test") != path


def test_what_save_to_disk_wrote_is_a_data_set(folder: Path, tmp_path: Path) -> None:
    import datasets

    datasets.load_dataset(str(folder)).save_to_disk(str(tmp_path / "both"))
    datasets.load_dataset(str(folder), split="test").save_to_disk(str(tmp_path / "one"))
    assert len(fetched(f"hf:{tmp_path / 'both'}").read_text().splitlines()) == len(ROWS)
    assert len(fetched(f"hf:{tmp_path / 'one'}").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match=r"cannot be loaded: it has no splits, so none is 'test'"):
        fetched(f"hf:{tmp_path / 'one'}:test")


def test_a_split_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded: .*nothing") as caught:
        fetched(f"hf:{folder}:nothing")
    assert "\n" not in str(caught.value)


def test_files_that_do_not_go_together_say_why(folder: Path) -> None:
    write(folder, "test.jsonl", lines([{"other": 1}]))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*column names"):
        fetched(f"hf:{folder}")


def test_a_data_set_trains_a_model(folder: Path, tmp_path: Path) -> None:
    (folder / "test.jsonl").unlink()
    write(folder, "train.jsonl", lines([{"text": TEXT[n : n + 400]} for n in range(0, 4000, 400)]))
    last = train(values(f"hf:{folder}:train", loop={"steps": 2}), tmp_path / "out")
    assert last.name == "checkpoint-00000002"
