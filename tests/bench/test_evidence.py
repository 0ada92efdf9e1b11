"""Evidence goes piece by piece: equal parameters, one record each, and what was stopped goes on."""

import json
import re
from pathlib import Path

import pytest

from tests.train.small import TEXT, write
from writehead.bench import evidence
from writehead.bench.evidence import Scale, pieces, records, table, work
from writehead.config import ModelConfig
from writehead.costs import parameters, skeleton
from writehead.train.loop import Trainer

TINY = Scale(dim=16, depth=1, steps=2, batch=2, vocab=280, tokens=200, seeds=2)


def data(folder: Path) -> dict[str, list[str]]:
    return {"train": [write(folder)], "valid": [write(folder, "held.txt", TEXT[:3000])]}


def test_the_variants_of_head_sharing_have_equal_parameters() -> None:
    sizes = {}
    for piece in pieces(["lm"], {"train": ["stdlib"]}, Scale(seeds=1)):
        config = ModelConfig.from_dict({"vocab": 2048, **piece.run.model})
        sizes[piece.variant] = parameters(skeleton(config))
    assert list(sizes) == ["multi-head", "multi-query", "1 head", "2 heads", "4 heads", "8 thin heads"]
    assert max(sizes.values()) / min(sizes.values()) < 1.001
    widths = [
        p.run.model["feedforward"]["hidden"] for p in pieces(["lm"], {"train": ["stdlib"]}, Scale(seeds=1))
    ]
    assert widths[0] == 512 < widths[1] < widths[2]
    assert len(set(widths[2:])) == 1  # the paper's four shrunk models have one width too


def test_seeds_come_one_after_the_other_over_all_variants() -> None:
    found = pieces(["alibi", "lm"], {"train": ["stdlib"]}, Scale(seeds=2))
    assert [p.seed for p in found] == [0] * 11 + [1] * 11
    assert all(p.run.seed == p.seed for p in found)
    with pytest.raises(ValueError, match="unknown experiment 'lmm'; did you mean 'lm'"):
        pieces(["lmm"], {}, Scale())


@pytest.mark.slow
def test_work_that_was_stopped_goes_on_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = pieces(["alibi"], data(tmp_path), TINY)[:3]
    train, began = Trainer.train, []

    def stopped(self: Trainer) -> Path:
        began.append(self.config.position["name"])
        if len(began) == 2:
            raise KeyboardInterrupt
        return train(self)

    monkeypatch.setattr(Trainer, "train", stopped)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work(todo, tmp_path / "out", said.append)
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"piece": ["torn')  # what a crash while writing leaves
    assert [r["piece"][1] for r in records(tmp_path / "out")] == ["sinusoidal"]
    work(todo, tmp_path / "out", said.append)
    assert began == ["sinusoidal", "learned", "learned", "rotary"]
    found = evidence.of(todo, tmp_path / "out")
    assert [r["piece"][1] for r in found] == ["sinusoidal", "learned", "rotary"]
    assert list(found[0]["results"]) == [
        f"{word} {64 * n}" for n in evidence.LONGER for word in ("apart", "sliding")
    ]
    assert all(0 < nats < 10 for r in found for nats in r["results"].values())
    assert found[0]["machine"]["versions"]["torch"]


def test_a_table_has_means_spreads_and_the_papers_figures() -> None:
    def record(variant: str, seed: int, nats: float, paper: float | None) -> dict:
        return {"piece": ["lm", variant, seed], "results": {"nats": nats}, "parameters": 1234, "paper": paper}

    text = table([record("a", 0, 2.0, 29.9), record("b", 0, 3.0, None), record("a", 1, 2.5, 29.9)], "lm")
    assert "| a | 1,234 | 2 | 2.250 ± 0.354 | 29.9 |" in text
    assert "| b | 1,234 | 1 | 3.000 |  |" in text
    assert all(len(re.findall(r"\|", line)) == 6 for line in text.splitlines())


def test_where_wikitext_is_missing_it_is_said(tmp_path: Path) -> None:
    section, said = evidence.sources(tmp_path)
    assert section == {"train": ["stdlib"]}
    assert "wanted: wikitext2.train.txt.gz, wikitext2.valid.txt.gz" in said
    for part in ("train", "valid"):
        write(tmp_path, f"wikitext2.{part}.txt.gz", "x")
    assert evidence.sources(tmp_path)[0]["valid"] == [str(tmp_path / "wikitext2.valid.txt.gz")]
    assert json.dumps(section)
