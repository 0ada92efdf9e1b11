"""Every row of the catalog against every law that applies to it; then patterns, positions, stores, models."""

import pytest
import torch
from torch import nn

from writehead.catalog import MIXERS
from writehead.config import ModelConfig
from writehead.core.bind import bound
from writehead.core.pattern import And, Causal, Leading, Pattern, PerHead, Window
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import rewind
from writehead.laws import DECODING, LAWS, Layers, ReadingLayers, build_tiny, check, check_row, laws_for
from writehead.mixers.softmax import Softmax
from writehead.model.decoder import Decoder
from writehead.model.seq2seq import Seq2Seq
from writehead.positions.alibi import ALiBi
from writehead.positions.base import NoPosition, Scheme
from writehead.positions.rope import Rotary
from writehead.positions.sinusoidal import PositionInfused
from writehead.positions.t5 import T5Bias

ROWS = [(row, law) for row in MIXERS for law in laws_for(row)]
TIMELESS = tuple(law for law in DECODING if law != "budget")  # whole models predict no bytes of their own
SINKS = And(Causal(), Window(6) | Leading(3))
PATTERNS: dict[str, Pattern] = {
    "causal": Causal(),
    "window of one": Window(1),
    "window": Window(5),
    "sinks": SINKS,
    "first keys only": Causal() & Leading(3),
    "per head": PerHead((Window(3), Causal() & Leading(4), SINKS, Window(7))),
    "per head with one that sees all": PerHead((Window(3), Causal(), Window(1), SINKS)),
}
SCHEMES = {
    "none": NoPosition,
    "rotary": lambda: Rotary(4),
    "rotary interleaved": lambda: Rotary(4, pairs="interleaved", rotary_dim=2),
    "infused": lambda: PositionInfused(16),
    "alibi": lambda: ALiBi(4),
    "t5": lambda: T5Bias(4, buckets=8, max_distance=20),
}


class Bound(nn.Module):
    """The mixer as a decode engine runs it: its computation as a plain function."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer, self.init_state = mixer, mixer.init_state

    def forward(self, x, pos, state=None):
        return self.mixer.bind(bound)(x, pos, state)


def assert_holds(verdict):
    assert verdict.passed, verdict


@pytest.mark.parametrize(("row", "law"), ROWS)
def test_every_row_of_the_catalog_obeys(row, law):
    (verdict,) = check_row(row, laws=[law])
    assert_holds(verdict)
    assert (verdict.row, verdict.law) == (row, law)


@pytest.mark.parametrize("law", DECODING)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_obeys_with_two_kv_heads(pattern, law):
    mixer = Softmax(
        16, heads=4, kv_heads=2, bias="all", qk_norm=1e-6, pattern=PATTERNS[pattern], position=Rotary(4)
    )
    bounded = pattern not in ("causal", "per head with one that sees all")
    assert_holds(check(mixer, law, decodes="O(W)" if bounded else "O(S)", seed=1))


@pytest.mark.parametrize("law", TIMELESS)
def test_a_mixer_bound_for_an_engine_obeys(law):
    mixer = Softmax(16, heads=4, kv_heads=2, bias="all", qk_norm=1e-6, pattern=SINKS, position=Rotary(4))
    assert_holds(check(Bound(mixer), law, seed=7))


@pytest.mark.parametrize("law", DECODING)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_position_scheme_obeys_in_a_ring_behind_sinks(scheme, law):
    mixer = Softmax(16, heads=4, kv_heads=1, pattern=SINKS, position=SCHEMES[scheme]())
    assert_holds(check(mixer, law, decodes="O(W)", seed=2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_position_scheme_splits_and_ignores_padding_in_a_growing_cache(scheme):
    mixer = Softmax(16, heads=4, position=SCHEMES[scheme]())
    for law in ("split", "padding", "select"):
        assert_holds(check(mixer, law, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("pattern", [Causal(), SINKS], ids=["causal", "sinks"])
def test_caches_of_fewer_bits_obey_among_themselves(dtype, pattern):
    mixer = Softmax(16, heads=4, kv_heads=2, pattern=pattern, position=Rotary(4))
    for law in DECODING:
        assert_holds(check(mixer, law, store=Store(dtype=dtype, slack=1), decodes=None, seed=4))


@pytest.mark.parametrize("law", ["encode rows", "encode padding"])
@pytest.mark.parametrize("scheme", ["rotary", "alibi", "t5", "infused"])
def test_encoders_obey_with_a_window_on_both_sides(scheme, law):
    position: Scheme = T5Bias(4, bidirectional=True) if scheme == "t5" else SCHEMES[scheme]()
    mixer = Softmax(16, heads=4, kv_heads=2, pattern=Window(4, after=3) | Leading(2), position=position)
    assert_holds(check(mixer, law))


def decoder(**values) -> Decoder:
    mixers = (
        {"name": "mqa", "heads": 4},
        {"name": "sink_mqa", "heads": 4, "pattern": SINKS_SPEC},
        {"name": "gqa", "heads": 4},
    )
    config = {
        "vocab": 11,
        "dim": 16,
        "depth": 3,
        "mixer": mixers,
        "feedforward": {"name": "dense", "hidden": 8},
        **values,
    }
    return Decoder(ModelConfig(**config))


SINKS_SPEC = {
    "name": "and",
    "a": {"name": "causal"},
    "b": {"name": "or", "a": {"name": "window", "window": 6}, "b": {"name": "leading", "count": 3}},
}


@pytest.mark.parametrize("law", TIMELESS)
@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rotary", "alibi", "t5"])
def test_whole_decoders_of_mixed_layers_obey(position, law):
    spec = {"name": position} | ({"max_context": 80} if position == "learned" else {})
    order = "post" if position == "t5" else "parallel" if position == "alibi" else "pre"
    model = decoder(position=spec, stack={"name": "residual", "order": order, "dropout": 0.1})
    assert_holds(check(Layers(model), law, length=13))


@pytest.mark.slow
@pytest.mark.parametrize("law", TIMELESS)
def test_a_decoder_that_reads_an_encoder_obeys(law):
    encoder = ModelConfig(
        vocab=11, dim=16, depth=1, kind="encoder", mixer={"name": "bidirectional", "heads": 4},
        position={"name": "t5"}, feedforward={"name": "dense", "hidden": 8},
    )  # fmt: skip
    config = ModelConfig(
        vocab=11, dim=16, depth=2, kind="seq2seq", mixer={"name": "mqa", "heads": 4}, position={"name": "t5"},
        cross={"name": "cross", "heads": 4, "kv_heads": 2}, encoder=encoder,
        feedforward={"name": "chunked", "chunk": 5, "hidden": 8},
    )  # fmt: skip
    assert_holds(check(ReadingLayers(Seq2Seq(config)), law, length=13))


CACHED = [r for r in MIXERS if MIXERS[r].target.split(":")[1] in ("Softmax", "TransformerXL")]


@pytest.mark.parametrize("row", [row for row in CACHED if "rewind" in laws_for(row)])
def test_every_softmax_row_does_rewind_as_far_as_its_slack(row):
    mixer = build_tiny(MIXERS[row], {"name": "rotary"})
    x = torch.randn(2, 40, 16)
    _, state, _ = mixer(x, Positions.range(2, 0, 40), mixer.init_state(2, x, Store(slack=7)))
    rewind(state, 7)


def test_a_verdict_names_what_deviated_and_the_mixer_is_left_alone():
    mixer = Softmax(16, heads=4)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    verdict = check(mixer, "split", name="mine")
    assert verdict.row == "mine"
    assert 0 < verdict.deviation < 1e-12
    assert "comparisons; the worst: " in verdict.detail
    assert all(
        p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in mixer.named_parameters()
    )
    assert check(mixer, "split").row == "Softmax"


def test_a_law_tries_other_tokens_with_another_seed_and_the_same_with_the_same():
    mixer = Softmax(16, heads=4)
    assert check(mixer, "split", seed=5) == check(mixer, "split", seed=5)
    assert check(mixer, "split", seed=5).deviation != check(mixer, "split", seed=6).deviation


def test_unknown_laws_and_rows_are_refused():
    with pytest.raises(ValueError, match="unknown law 'splits'; did you mean 'split'"):
        check(Softmax(16), "splits")
    with pytest.raises(ValueError, match=r"unknown system 'mqq'; did you mean"):
        check_row("mqq")
    with pytest.raises(ValueError, match="unknown law 'splits'"):
        check_row("mqa", laws=["splits"])


def test_rows_that_only_encode_have_the_laws_of_encoders_only():
    assert laws_for("bidirectional") == ("encode rows", "encode padding")
    assert set(laws_for("mqa")) == set(LAWS)
    assert set(laws_for("cross")) == set(DECODING)
