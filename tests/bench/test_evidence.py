"""Evidence goes piece by piece: equal parameters, one record each, and what was stopped goes on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.train.small import TEXT, write
from writehead.bench import evidence, evidence_pages
from writehead.bench.evidence import RECORDS, records, work
from writehead.bench.experiments import ACROSS, HEADS, LONGER, MULTI30K, TRANSLATORS, Sources, pieces, sources
from writehead.cli.bench import command
from writehead.config import ModelConfig
from writehead.costs import parameters, skeleton
from writehead.train.loop import Trainer
from writehead.train.start import begin

PAIRS = "".join(f"a {n} dog runs\tein {n} Hund rennt\n" for n in range(60))
TINY = {"dim": 16, "depth": 1, "steps": 2, "batch": 2, "vocab": 280, "tokens": 200, "seeds": 2}
NOWHERE = Sources({"train": ["stdlib"]}, {"train": ["a.tsv"], "valid": ["b.tsv"]}, "c.tsv")


def data(folder: Path) -> Sources:
    return Sources({"train": [write(folder)], "valid": [write(folder, "held.txt", TEXT[:3000])]})


def size(piece: evidence.Piece, vocab: int) -> int:
    model = {"vocab": vocab, **piece.run.model}
    if "encoder" in model:
        model["encoder"] = {"vocab": vocab, **model["encoder"]}
    return parameters(skeleton(ModelConfig.from_dict(model)))


@pytest.mark.parametrize(("name", "vocab"), [("lm", 2048), ("translation", 3000)])
def test_the_variants_of_head_sharing_have_equal_parameters(name: str, vocab: int) -> None:
    found = {piece.variant: piece for piece in pieces([name], NOWHERE, seeds=1)}
    assert set(HEADS) <= set(found)
    sizes = [size(piece, vocab) for piece in found.values()]
    assert max(sizes) / min(sizes) < 1.001
    widths = {variant: piece.run.model["feedforward"]["hidden"] for variant, piece in found.items()}
    assert widths["multi-head"] == 512 < widths["multi-query"] < widths["1 head"]
    assert len({widths[v] for v in list(HEADS)[2:]}) == 1  # the paper's four shrunk models have one width too


def test_translation_widens_as_the_paper_does() -> None:
    found = {piece.variant: piece.run.model for piece in pieces(["translation"], NOWHERE, seeds=1)}
    assert list(found) == list(TRANSLATORS)
    assert len(TRANSLATORS) == 8 + len(ACROSS)
    for variant, theirs in (("multi-query", 5440), ("multi-query local", 5440), ("8 thin heads", 6784)):
        assert abs(found[variant]["feedforward"]["hidden"] / 512 - theirs / 4096) < 0.001
        assert found[variant]["encoder"]["feedforward"] == found[variant]["feedforward"]
    for variant, model in found.items():
        shared = model["mixer"]["kv_heads"]
        assert model["encoder"]["mixer"]["kv_heads"] == shared
        assert model["cross"]["kv_heads"] == (8 if variant in ACROSS else shared)
        assert ("pattern" in model["mixer"]) == variant.endswith("local")
        assert "pattern" not in model["encoder"]["mixer"]


def test_seeds_come_one_after_the_other_over_all_variants() -> None:
    found = pieces(["alibi", "lm"], NOWHERE, seeds=2)
    assert [p.seed for p in found] == [0] * 11 + [1] * 11
    assert all(p.run.seed == p.seed for p in found)
    with pytest.raises(ValueError, match="unknown experiment 'lmm'; did you mean 'lm'"):
        pieces(["lmm"], NOWHERE)


def test_a_piece_is_known_by_what_it_does_not_by_where_its_data_is() -> None:
    piece = pieces(["translation"], NOWHERE, seeds=1)[0]
    moved = Sources({}, {"train": ["/elsewhere/a.tsv"], "valid": ["/elsewhere/b.tsv"]}, "/elsewhere/c.tsv")
    assert pieces(["translation"], moved, seeds=1)[0].key == piece.key
    assert pieces(["translation"], NOWHERE, seeds=1, steps=7)[0].key != piece.key
    said = json.dumps(piece.key)  # defaults, and so options and sections yet to come, are no part of it
    assert "clip" not in said
    assert "masks" not in said


@pytest.mark.slow
def test_work_that_was_stopped_goes_on_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = pieces(["alibi"], data(tmp_path), **TINY)[:3]
    train, began = Trainer.train, []

    def stopped(self: Trainer) -> Path:
        began.append(self.config.position["name"])
        if len(began) == 2:
            raise KeyboardInterrupt
        return train(self)

    monkeypatch.setattr(Trainer, "train", stopped)
    out, runs = tmp_path / "out", tmp_path / "runs"
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work(todo, out, runs, said.append)
    with (out / "results.jsonl").open("a") as file:
        file.write('{"piece": ["torn')  # what a crash while writing leaves
    assert [r["piece"][1] for r in records(out)] == ["sinusoidal"]
    pages: list[int] = []
    work(todo, out, runs, said.append, lambda: pages.append(len(records(out))))
    assert began == ["sinusoidal", "learned", "learned", "rotary"]
    assert pages == [2, 3]
    found = evidence.of(todo, out)
    assert [r["piece"][1] for r in found] == ["sinusoidal", "learned", "rotary"]
    assert list(found[0]["results"]) == [f"{word} {64 * n}" for n in LONGER for word in ("apart", "sliding")]
    assert all(0 < nats < 10 for r in found for nats in r["results"].values())
    assert found[0]["machine"]["versions"]["torch"]
    assert found[0]["from_step"] == 0
    assert found[0]["cpu_seconds_of_a_step"] > 0


def test_a_piece_that_another_process_trains_is_left_to_it(tmp_path: Path) -> None:
    todo = pieces(["lm"], data(tmp_path), **TINY)[:1]
    said: list[str] = []
    folder = tmp_path / f"lm-multi-head-seed-0-{evidence.digest(todo[0].key)[:8]}"
    with begin(todo[0].run, folder, device="cpu"):
        work(todo, tmp_path, tmp_path, said.append)
    assert said == ["lm, multi-head, seed 0: another process is at it"]
    assert not records(tmp_path)


@pytest.mark.slow
def test_translations_are_scored_on_the_test_set(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="needs the extra translate")
    files = [write(tmp_path, f"{name}.tsv", PAIRS) for name in ("train", "valid", "test")]
    known = Sources({"train": ["stdlib"]}, {"train": files[:1], "valid": files[1:2]}, files[2])
    todo = pieces(["translation"], known, **{**TINY, "tokens": 7, "seeds": 1})[:1]
    work(todo, tmp_path / "out", tmp_path / "runs", lambda text: None)
    (record,) = records(tmp_path / "out")
    assert set(record["results"]) == {"ln PPL", "BLEU greedy", "BLEU beam 4"}
    assert record["scored"] == 7
    assert "case:lc" in record["signature"]
    evidence_pages.write(todo, tmp_path / "out", ())
    assert record["signature"] in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_scorer_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"translations are scored with sacreBLEU: pip install"):
        work(pieces(["translation"], NOWHERE, **TINY), tmp_path, tmp_path)


def test_where_data_is_missing_it_is_said(tmp_path: Path) -> None:
    found = sources(tmp_path)
    assert found.text == {"train": ["stdlib"]}
    assert found.parallel is None
    assert "wanted: wikitext2.train.txt.gz, wikitext2.valid.txt.gz" in found.said[0]
    assert "multi30k.en-de.test_2016_flickr.tsv.gz" in found.said[1]
    assert pieces(["translation"], found) == []
    for part in ("train", "valid"):
        write(tmp_path, f"wikitext2.{part}.txt.gz", "x")
    for part in ("train", "val", "test_2016_flickr"):
        write(tmp_path, MULTI30K.format(part), "x")
    found = sources(tmp_path)
    assert found.text["valid"] == [str(tmp_path / "wikitext2.valid.txt.gz")]
    assert found.tested == str(tmp_path / MULTI30K.format("test_2016_flickr"))
    assert json.dumps(found.parallel)


def test_a_page_is_not_written_without_the_runs_that_there_are(tmp_path: Path) -> None:
    model = {"vocab": 300, "dim": 8}
    run = {"seed": 0, "model": model, "data": {"kind": "parallel", "train": ["x.tsv"], "valid": ["y.tsv"]}}
    piece = {"piece": ["translation", "multi-head", 0, 1000, run], "results": {}}
    (tmp_path / RECORDS).write_text(json.dumps(piece) + "\n")
    done = CliRunner().invoke(command, ["evidence", "--pages", "--out", str(tmp_path)])
    assert isinstance(done.exception, ValueError)
    assert "1 of the records in" in str(done.exception)
    assert "give the --data, --seeds, --steps and --dim that they had" in str(done.exception)
    assert not (tmp_path / "README.md").exists()
