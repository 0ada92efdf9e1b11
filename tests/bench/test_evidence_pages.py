"""The page of the evidence says what is missing, and claims only what its records show."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from writehead.bench.evidence_claims import BLEU, PERPLEXITY, paired
from writehead.bench.evidence_longer import longer_page
from writehead.bench.evidence_pages import by_variant, section, write
from writehead.bench.experiments import LONGER, Piece, Sources, pieces

DATA = Sources({"train": ["stdlib"]}, {"train": ["a.tsv"], "valid": ["b.tsv"]}, "c.tsv")
MACHINE = {"cpu": "a chip", "commit": "0123456789abcdef", "threads": 1}


def record(piece: Piece, results: dict[str, float]) -> dict[str, Any]:
    facts = {"signature": "nrefs:1|case:lc", "scored": 1000, "cpu_seconds_of_a_step": 2.0}
    return {"piece": piece.key, "results": results, "parameters": 1234, "machine": MACHINE, **facts}


def translated(bleu: dict[str, float], seeds: int = 1) -> tuple[list[Piece], list[dict[str, Any]]]:
    planned = pieces(["translation"], DATA, seeds=2)
    done = [piece for piece in planned if piece.variant in bleu and piece.seed < seeds]
    scores = {"ln PPL": 2.0, "BLEU greedy": 20.0}
    found = [record(p, {**scores, "BLEU beam 4": bleu[p.variant] + p.seed}) for p in done]
    return planned, found


def test_a_partial_page_names_the_runs_that_are_missing() -> None:
    text = "\n".join(section("translation", *translated({"multi-head": 30.0, "1 head": 29.0})))
    assert "**2 of 18 runs are done.** Missing: multi-head (seed 1); multi-query; multi-head local" in text
    assert (
        "| multi-head | 8 x 16 | 512 | 1,234 | 1 | 2.000 | 20.00 | 30.00 | 1.424 | 26.7 | 27.7 / 28.4 |"
        in text
    )
    assert "| multi-query | 8 x 16, 1 shared | 680 |  | 0 |  |  |  | 1.439 | 26.5 | 27.5 / 28.5 |" in text
    assert "Multi-query against" not in text


def test_nothing_is_claimed_before_a_run_is_done() -> None:
    planned, _ = translated({})
    text = "\n".join(section("translation", planned, []))
    assert "**0 of 18 runs are done.**" in text
    assert "holds" not in text


@pytest.mark.parametrize(("shared", "verdict"), [(29.5, "holds"), (29.3, "**does not hold**")])
def test_multi_query_may_lose_six_tenths(shared: float, verdict: str) -> None:
    text = "\n".join(section("translation", *translated({"multi-head": 30.0, "multi-query": shared})))
    assert f"{shared - 30:+.2f} BLEU (mean of one seed). Within 0.6 BLEU: {verdict}." in text


def test_a_shrunk_baseline_that_is_not_beaten_is_shown() -> None:
    planned, found = translated({"multi-query": 29.0, "1 head": 28.0, "2 heads": 29.5})
    text = "\n".join(section("translation", planned, found))
    assert "1 head +1.00, 2 heads -0.50. Ahead of every one: **does not hold** (of 2 of 4 so far)." in text


def test_where_sharing_costs_is_told_beside_multi_query() -> None:
    planned, found = translated({"multi-query": 29.0, "multi-query, all heads across": 29.7})
    text = "\n".join(section("translation", planned, found))
    assert "source, against multi-query (plus is better): +0.70 BLEU, +0.00 % perplexity." in text
    assert "| 29.70 |  |  |  |" in text


def test_only_seeds_that_both_have_are_compared() -> None:
    _, some = translated({"multi-query": 29.0}, seeds=2)
    _, other = translated({"multi-head": 28.0})
    rows = by_variant([*some, *other])
    assert paired(rows, "multi-query", "multi-head", BLEU) == (1.0, 1)
    assert paired(rows, "multi-query", "1 head", BLEU) is None


def test_logarithms_of_perplexities_differ_by_per_cent_of_the_perplexity() -> None:
    assert PERPLEXITY.better(math.log(98.0), math.log(100.0)) == pytest.approx(2)
    assert PERPLEXITY.better(math.log(110.0), math.log(100.0)) == pytest.approx(-10)
    assert PERPLEXITY.verdict(-2.1).endswith("**does not hold**.")


def test_a_mean_has_its_spread() -> None:
    text = "\n".join(section("translation", *translated({"multi-head": 30.0}, seeds=2)))
    assert "| 2 | 2.000 ± 0.000 | 20.00 ± 0.00 | 30.50 ± 0.71 |" in text


def test_lengths_beyond_training_are_judged(tmp_path: Path) -> None:
    planned = [p for p in pieces(["alibi"], DATA, seeds=1) if p.variant in ("alibi", "sinusoidal")]
    found = []
    for piece in planned:
        worse = 0.2 if piece.variant == "sinusoidal" else -0.01
        results = {f"{w} {64 * t}": 4 + worse * t for t in LONGER for w in ("apart", "sliding")}
        found.append(record(piece, results))
    text = "\n".join(section("alibi", planned, found))
    assert "- sinusoidal, apart: perplexity at 512 is 4.06 times that at 64: **rising**." in text
    assert "- alibi, sliding: perplexity at 512 is 0.93 times that at 64: flat or falling." in text


@pytest.mark.slow
def test_the_page_and_its_plots_come_from_the_records_of_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    planned, found = translated({"multi-head": 30.0, "multi-query": 29.9})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    write([*planned, *pieces(["lm"], DATA, seeds=1)], tmp_path, ["Multi30k"])
    text = (tmp_path / "README.md").read_text()
    assert "**2 of 18 runs are done.**" in text
    assert "**0 of 6 runs are done.**" in text
    assert "Not measured yet" in text
    assert (tmp_path / "translation.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "lm.png").exists()


def test_longer_runs_are_judged_by_their_scores(tmp_path: Path) -> None:
    def scored(kind: str, bleu: float) -> None:
        said = {
            "bleu": bleu,
            "ln_perplexity": 1.7,
            "sentences": 1000,
            "search": "4 beams",
            "signature": "sig",
        }
        (tmp_path / "multi30k").mkdir(exist_ok=True)
        text = json.dumps(said | {"machine": {"commit": "0123456789abcdef"}})
        (tmp_path / "multi30k" / f"{kind}.json").write_text(text)

    assert longer_page(tmp_path)[-1] == "Not run yet: `examples/multi30k.sh DATA OUT`."
    scored("multi-head", 36.5)
    lines = longer_page(tmp_path)
    assert "| multi-head | 36.50 | 1.700 | 1000 of test 2016 | 4 beams | 0123456789 |" in lines
    assert "- At least 33 BLEU: holds (of 1 of 2 so far)." in lines
    scored("multi-query", 32.9)
    assert "- At least 33 BLEU: **does not hold**." in longer_page(tmp_path)
    compared = "- Multi-query against multi-head (plus is better): -3.60 BLEU, +0.00 % perplexity. "
    assert f"{compared}Within 0.6 BLEU: **does not hold**." in longer_page(tmp_path)
    assert "- BLEU: lower-cased, sacreBLEU `sig`; one seed." in longer_page(tmp_path)
