"""The harness gets the log-probabilities that token by token arithmetic gives, and greedy continuations."""

from types import SimpleNamespace

import pytest
import torch

from tests.train.small import train, values, write
from writehead.convert.load import Loaded, load
from writehead.evaluate.harness import Scorer, adapter


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("harness")
    given = values(write(folder), data={"length": 32}, report={"eval_every": 0, "save_every": 0})
    return load(train(given, folder / "out"))


def by_hand(loaded: Loaded, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    said, greedy = 0.0, True
    for n, token in enumerate(continuation):
        with torch.inference_mode():
            logits, _ = loaded.model(torch.tensor([context + continuation[:n]]))
        said += logits[0, -1].log_softmax(-1)[token].item()
        greedy = greedy and int(logits[0, -1].argmax()) == token
    return said, greedy


def test_continuations_have_the_log_probabilities_of_their_tokens(loaded: Loaded) -> None:
    scorer = Scorer(loaded.model, loaded.tokenizer, batch=2)
    cases = {
        ("line 3 of", " a text"): ("line 3 of", " a text"),
        ("a", "b"): ("a", "b"),
        ("", "line"): ("", "line"),
        ("line 1 ", "of"): ("line 1", " of"),  # a space at the end belongs to what follows
    }
    found = scorer.continuations(list(cases))
    for (before, after), (said, greedy) in zip(cases.values(), found, strict=True):
        past = scorer.ids(before) or [scorer.first]
        right, best = by_hand(loaded, past, scorer.ids(after))
        assert said == pytest.approx(right, rel=1e-4)
        assert greedy == best


def test_a_greedy_continuation_is_recognised(loaded: Loaded) -> None:
    scorer = Scorer(loaded.model, loaded.tokenizer)
    said = scorer.continued("line 3 of a", {"max_gen_toks": 5, "until": []})
    assert scorer.ids("line 3 of a" + said)[: len(scorer.ids("line 3 of a"))] == scorer.ids("line 3 of a")
    assert scorer.continuations([("line 3 of a", said)])[0][1]
    assert not scorer.continuations([("line 3 of a", "\u00fc")])[0][1]


def test_a_long_context_is_cut_off_at_its_beginning(loaded: Loaded) -> None:
    scorer = Scorer(loaded.model, loaded.tokenizer, window=8)
    (found,) = scorer.continuations([("x" * 50 + "line 12", " of")])
    assert found[0] == pytest.approx(
        by_hand(loaded, scorer.ids("line 12 of")[-9:-3], scorer.ids(" of"))[0], rel=1e-4
    )


def test_a_whole_text_is_scored_in_windows(loaded: Loaded) -> None:
    scorer = Scorer(loaded.model, loaded.tokenizer, window=8)
    ids = [scorer.first, *scorer.ids("line 12 of a text")]
    parts = [by_hand(loaded, ids[n : n + 1], ids[n + 1 : n + 9])[0] for n in range(0, len(ids) - 1, 8)]
    assert scorer.whole(["line 12 of a text", ""]) == [pytest.approx(sum(parts), rel=1e-4), 0.0]


def test_stop_strings_end_a_continuation(loaded: Loaded) -> None:
    scorer = Scorer(loaded.model, loaded.tokenizer)
    said = scorer.continued("line 3", {"max_gen_toks": 12})
    stop = said[3]
    assert scorer.continued("line 3", {"max_gen_toks": 12, "until": [stop]}) == said[: said.index(stop)]
    with pytest.raises(ValueError, match=r"unknown generation arguments \['beams'\] \(accepted: until, "):
        scorer.continued("line", {"beams": 3})


def test_what_cannot_be_wrapped_is_refused(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="window=1 must be at least 2"):
        Scorer(loaded.model, loaded.tokenizer, window=1)
    monkeypatch.setattr("writehead.evaluate.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the harness needs the package lm-eval: pip install"):
        adapter(loaded)


def test_the_harness_calls_it(loaded: Loaded) -> None:
    pytest.importorskip("lm_eval.api.model", reason="needs the extra harness")
    model = adapter(loaded)
    scorer = Scorer(loaded.model, loaded.tokenizer)
    asked = [SimpleNamespace(args=("line 3", " of")), SimpleNamespace(args=("a", "b"))]
    assert model.loglikelihood(asked) == scorer.continuations([one.args for one in asked])
    assert model.loglikelihood_rolling([SimpleNamespace(args=("line",))]) == scorer.whole(["line"])
    options = {"until": [], "max_gen_toks": 4}
    asked = [SimpleNamespace(args=("line 3", options))]
    assert model.generate_until(asked) == [scorer.continued("line 3", options)]
