"""Broken twins: for every law mixers with a realistic defect, and the laws that exactly they break.

`causal` never fails alone: a call of one token cannot know later ones, so `split` must fail with it.
"""

import pytest
from twins import (
    AnotherFormulaForOneToken,
    BeamsNotMoved,
    BytesNotTold,
    CentredEncoder,
    CentredOverTheBatch,
    Changed,
    CountForgottenInBytes,
    Error,
    FromShapes,
    GradientCutBetweenCalls,
    JoinedTheOtherWayRound,
    Mean,
    NotANumberBesidePadding,
    NothingEverForgotten,
    NothingRewound,
    OnlyTheCountRewound,
    PaddingRemembered,
    PadsEncoded,
    PastKeptInTheModule,
    ReadsInOrder,
    ReadsSourcePadding,
    RewoundBeyondTheRing,
    RingOneTooShort,
    SeesTheNextToken,
    SharedWhenNothingMoves,
    Summary,
    UnnumberedCross,
    softmax,
    with_state,
)

from writehead.core.cache import KV
from writehead.core.pattern import And, Full
from writehead.laws import DECODING, ENCODING, check

TWINS = {
    "a branch on T == 1 that drifts": (AnotherFormulaForOneToken(), None, {"split"}),
    "gradient cut between calls": (GradientCutBetweenCalls(), None, {"split"}),
    "ring one too short": (softmax(RingOneTooShort(4)), "O(W)", {"split", "rewind"}),
    "mask off by one": (softmax(SeesTheNextToken()), "O(S)", {"causal", "split"}),
    "pattern that claims to be causal": (softmax(And(Full(), SeesTheNextToken())), None, {"causal", "split"}),
    "past kept in the module": (PastKeptInTheModule(), None, {"select"}),
    "beams not moved": (with_state(BeamsNotMoved), None, {"select"}),
    "joined the other way round": (with_state(JoinedTheOtherWayRound), None, {"select"}),
    "select that shares a ring": (Changed(SharedWhenNothingMoves), None, {"select"}),
    "memory read in order": (ReadsInOrder(16, heads=4), None, {"select"}),
    "sources joined without their numbers": (UnnumberedCross(16, heads=4), None, {"select"}),
    "error for one row": (Error(), None, {"select", "budget"}),
    "statistics over the batch": (CentredOverTheBatch(), None, {"select", "padding"}),
    "padding remembered": (PaddingRemembered(), None, {"padding"}),
    "bias from shapes": (softmax(position=FromShapes(4)), None, {"padding", "split", "select"}),
    "source padding read": (ReadsSourcePadding(16, heads=4), None, {"padding", "select"}),
    "bytes not told": (BytesNotTold(), None, {"budget"}),
    "bytes told wrongly": (CountForgottenInBytes(), None, {"budget"}),
    "growth beyond a declared window": (softmax(NothingEverForgotten(4)), "O(W)", {"budget"}),
    "no growth where it was declared": (Mean(), "O(S)", {"budget"}),
    "only the count rewound": (with_state(OnlyTheCountRewound), None, {"rewind"}),
    "nothing rewound": (with_state(NothingRewound), None, {"rewind"}),
    "rewound beyond the ring": (Changed(RewoundBeyondTheRing), None, {"rewind"}),
    "not-a-number beside padding": (
        NotANumberBesidePadding(),
        None,
        {"split", "causal", "select", "padding"},
    ),
}
ENCODERS = {
    "padding read": (PadsEncoded(16, heads=4, pattern=Full()), {"encode padding"}),
    "statistics over the batch": (
        CentredEncoder(16, heads=4, pattern=Full()),
        {"encode rows", "encode padding"},
    ),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_breaks_exactly_its_laws(twin):
    mixer, decodes, broken = TWINS[twin]
    verdicts = [check(mixer, law, decodes=decodes, length=13) for law in DECODING]
    assert {v.law for v in verdicts if not v.passed} == broken, verdicts


@pytest.mark.parametrize("twin", ENCODERS)
def test_a_broken_encoder_breaks_exactly_its_laws(twin):
    mixer, broken = ENCODERS[twin]
    verdicts = [check(mixer, law, length=13) for law in ENCODING]
    assert {v.law for v in verdicts if not v.passed} == broken, verdicts


def test_every_law_has_a_twin_and_each_but_causal_one_that_it_alone_catches():
    sets = [broken for *_, broken in (*TWINS.values(), *ENCODERS.values())]
    assert set.union(*sets) == {*DECODING, *ENCODING}
    alone = {next(iter(broken)) for broken in sets if len(broken) == 1}
    assert alone == {*DECODING, "encode padding"} - {"causal"}


@pytest.mark.parametrize("law", DECODING)
@pytest.mark.parametrize("mixer", [Mean(), with_state(Summary), Changed(KV)], ids=["sums", "node", "ring"])
def test_what_the_twins_are_made_of_obeys(mixer, law):
    verdict = check(mixer, law, decodes="O(1)", length=13)
    assert verdict.passed, verdict


def test_a_failure_says_in_words_what_went_wrong():
    def said(mixer, law, **options):
        verdict = check(mixer, law, **options)
        assert not verdict.passed
        return verdict.detail

    assert said(BytesNotTold(), "budget") == (
        "the mixer has no state_bytes(batch, context, itemsize, store): its state has no budget"
    )
    assert "an empty state with" in said(CountForgottenInBytes(), "budget")
    assert said(Error(), "select") == "RuntimeError: one row is no batch"
    assert said(Mean(), "encode rows") == "the mixer has no encode"
    assert "declared O(S), which is linear, but the state has 136 bytes" in said(
        Mean(), "budget", decodes="O(S)"
    )
    assert "declared O(W), which is bounded" in said(
        softmax(NothingEverForgotten(4)), "budget", decodes="O(W)"
    )
    assert "of a state selected by [" in said(with_state(BeamsNotMoved), "select")
    assert "outputs after taking back" in said(with_state(NothingRewound), "rewind")
    with pytest.raises(
        ValueError, match=r"length=12 is too short to cut, gap and join; it must be at least 13"
    ):
        check(Mean(), "split", length=12)


def test_a_deviation_is_a_number_unless_there_is_none():
    assert check(AnotherFormulaForOneToken(), "split").deviation > 1e-3
    assert check(NotANumberBesidePadding(), "padding").deviation is None
    assert check(Error(), "select").deviation is None
