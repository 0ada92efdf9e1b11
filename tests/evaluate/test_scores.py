"""Accuracy and BLEU are what counting by hand, and sacreBLEU itself, give."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.small import train, write
from tests.train.test_parallel import runs
from writehead.convert.load import load
from writehead.decode.generate import generate
from writehead.evaluate.labels import Accuracy, accuracy
from writehead.evaluate.translation import reference_nats, translate, translation
from writehead.train.data import start_token


def trained(kind: str, folder: Path, **loop: Any) -> Any:
    run = runs(folder)[kind]
    run["loop"] |= loop
    run["report"] |= {"eval_every": 0, "save_every": 0}
    return load(train(run, folder / "out"))


@pytest.mark.slow
def test_a_trained_classifier_is_right_and_its_mistakes_are_counted(tmp_path: Path) -> None:
    loaded = trained("labelled", tmp_path, steps=60)
    lines = [(n, "even" if n % 2 == 0 else "odd") for n in range(40)]
    path = write(tmp_path, "test.tsv", "".join(f"{label}\tnumber {n} x\n" for n, label in lines))
    found = accuracy(loaded.model, loaded.tokenizer, (path,), batch=7)
    right = sum(
        accuracy(
            loaded.model, loaded.tokenizer, (write(tmp_path, "one.tsv", f"{label}\tnumber {n} x\n"),)
        ).right
        for n, label in lines
    )
    assert (found.right, found.count) == (right, 40)
    assert found.interval[0] < found.accuracy < found.interval[1]


def test_the_interval_is_wilsons() -> None:
    assert Accuracy(8, 10, 0.0, ()).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Accuracy(10, 10, 0.0, ()).interval == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_model_without_labels_classifies_nothing(tmp_path: Path) -> None:
    loaded = trained("text", tmp_path, steps=1)
    with pytest.raises(ValueError, match="the model's tokenizer holds no labels"):
        accuracy(loaded.model, loaded.tokenizer, (write(tmp_path, "a.tsv", "a\tb\n"),))


def test_translations_come_in_the_order_of_their_sources(tmp_path: Path) -> None:
    loaded = trained("parallel", tmp_path, steps=3)
    sources = ["say 12 please please", "say 3", "say 44 please"]
    end = sorted(loaded.tokenizer.eos)
    options = {
        "num_beams": 2,
        "max_new_tokens": 2 * (len(sources[0]) + 1) + 10,
        "tokenizer": loaded.tokenizer,
    }
    options["decoder_start_token_id"] = start_token(loaded.tokenizer)
    alone = [generate(loaded.model, [[*s.encode(), *end]], **options)[0].text for s in sources]
    for batch in (1, 3):
        assert translate(loaded.model, loaded.tokenizer, sources, num_beams=2, batch=batch) == alone


def test_references_cost_the_same_in_any_batch(tmp_path: Path) -> None:
    loaded = trained("parallel", tmp_path, steps=2)
    given = [(f"say {n}", f"sag {n} bitte" * (1 + n % 2)) for n in range(7)]
    one = reference_nats(loaded.model, loaded.tokenizer, given, batch=1)
    assert reference_nats(loaded.model, loaded.tokenizer, given, batch=4) == pytest.approx(one, rel=1e-5)


def test_bleu_is_sacrebleus(tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra translate")
    loaded = trained("parallel", tmp_path, steps=2)
    path = write(tmp_path, "t.tsv", "".join(f"say {n}\tsag {n} bitte\n" for n in range(5)))
    found = translation(loaded.model, loaded.tokenizer, (path,), num_beams=1, lowercase=True)
    references = [f"sag {n} bitte" for n in range(5)]
    assert found.bleu == sacrebleu.corpus_bleu(list(found.texts), [references], lowercase=True).score
    assert "case:lc" in found.signature


def test_without_sacrebleu_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from writehead.evaluate import translation as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="BLEU needs the package sacrebleu: pip install sacrebleu"):
        translation(None, None, ("x.tsv",))  # type: ignore[arg-type]
