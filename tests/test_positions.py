"""Position schemes: golden tables, what depends on distance only, angles far out, and every refusal."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writehead.core.positions import Positions, advance
from writehead.mixers.softmax import Softmax
from writehead.positions.alibi import ALiBi, slopes
from writehead.positions.base import NoPosition, has
from writehead.positions.learned import Learned
from writehead.positions.rope import Rotary
from writehead.positions.sinusoidal import PositionInfused, Sinusoidal
from writehead.positions.t5 import T5Bias, bucket_table

# the first distance of each T5 bucket, 32 buckets, distances up to 128
CAUSAL_FIRST = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
ONE_SIDE_FIRST = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]


def at(*index):
    return Positions(torch.tensor([index]))


def firsts(table):
    return [table.index(bucket) for bucket in range(max(table) + 1)]


def test_t5_buckets_begin_at_the_published_distances():
    assert firsts(bucket_table(32, 128)) == CAUSAL_FIRST
    assert firsts(bucket_table(16, 128)) == ONE_SIDE_FIRST


def test_t5_bias_looks_up_the_true_distance_on_both_sides():
    causal, both = T5Bias(2), T5Bias(2, bidirectional=True)
    for scheme in (causal, both):
        with torch.no_grad():
            scheme.table.copy_(torch.arange(32.0)[:, None] + torch.tensor([0.0, 0.5]))
    q, k = torch.tensor([[500]]), torch.arange(0, 1001)[None]
    past = causal.bias(q, k, torch.float64)[0, 0, 0].tolist()
    assert [past[500 - d] for d in CAUSAL_FIRST] == list(range(32))
    assert past[:386] == [31.0] * 386
    assert past[500:] == [0.0] * 501
    sides = both.bias(q, k, torch.float64)[0]
    assert [sides[0, 0, 500 - d].item() for d in ONE_SIDE_FIRST] == list(range(16))
    assert [sides[1, 0, 500 + d].item() for d in ONE_SIDE_FIRST[1:]] == [b + 16.5 for b in range(1, 16)]
    assert 16.0 not in sides[0].flatten().tolist()


def test_alibi_slopes_are_the_authors_for_any_number_of_heads():
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(16) == pytest.approx([2 ** (-i / 2) for i in range(1, 17)], rel=1e-15)
    assert slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert slopes(12) == pytest.approx([*slopes(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rel=1e-15)
    assert slopes(1) == [2.0**-8]


def test_alibi_penalises_distance_on_either_side():
    bias = ALiBi(2).bias(torch.tensor([[3, 7]]), torch.tensor([[0, 3, 9]]), torch.float64)
    slope = torch.tensor([2.0**-4, 2.0**-8]).double()[:, None, None]
    assert torch.equal(bias[0], -slope * torch.tensor([[3.0, 0, 6], [7, 4, 2]]))


def test_alibi_takes_a_checkpoints_own_slopes():
    bias = ALiBi(2, slopes_of_heads=[1.0, 0.25]).bias(torch.tensor([[4]]), torch.tensor([[0]]), torch.float64)
    assert bias.flatten().tolist() == [-4.0, -1.0]


def test_sinusoidal_waves_are_the_formulas_in_both_layouts():
    p, i = torch.arange(50).double()[:, None], torch.arange(4).double()
    whole = Sinusoidal(8).embed(Positions.range(1, 0, 50), torch.float64)[0]
    assert torch.allclose(whole[:, 0::2], (p / 10000 ** (2 * i / 8)).sin(), rtol=0, atol=1e-13)
    assert torch.allclose(whole[:, 1::2], (p / 10000 ** (2 * i / 8)).cos(), rtol=0, atol=1e-13)
    whole = Sinusoidal(8, layout="concatenated").embed(Positions.range(1, 0, 50), torch.float64)[0]
    assert torch.allclose(whole[:, :4], (p / 10000 ** (i / 3)).sin(), rtol=0, atol=1e-13)
    assert torch.allclose(whole[:, 4:], (p / 10000 ** (i / 3)).cos(), rtol=0, atol=1e-13)


def test_infused_positions_make_queries_and_keys_but_neither_values_nor_the_residual():
    mixer = Softmax(8, heads=2, position=PositionInfused(8)).double()
    x, wave = torch.randn(1, 9, 8).double(), Sinusoidal(8).wave(torch.arange(9)[None], torch.float64)
    q_and_k, v = mixer.qkv(x + wave)[0], mixer.qkv(x)[1]
    q, k = q_and_k.split([2, 2], 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    right = mixer.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(mixer(x, Positions.range(1, 0, 9))[0], right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "position",
    [PositionInfused(16), Rotary(4), Rotary(4, pairs="interleaved"), ALiBi(4), T5Bias(4), NoPosition()],
)
def test_values_do_not_change_when_all_positions_shift(position):
    mixer = Softmax(16, heads=4, position=position)
    x = torch.randn(2, 7, 16)
    near, far = (mixer(x, Positions.range(2, start, start + 7))[1] for start in (0, 40))
    assert torch.equal(near.v[:, :, :7], far.v[:, :, 40:47])


@pytest.mark.parametrize(
    "position", [Rotary(4), Rotary(4, pairs="interleaved", rotary_dim=2), ALiBi(4), T5Bias(4), NoPosition()]
)
def test_relative_schemes_see_distances_only(position):
    mixer = Softmax(16, heads=4, position=position).double()
    x = torch.randn(2, 9, 16).double()
    near = mixer(x, Positions.range(2, 0, 9))[0]
    gaps = mixer.encode(x, Positions.range(2, 1000, 1009))[0] if mixer.pattern.causal else None
    torch.testing.assert_close(gaps, near, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 100_000), st.integers(0, 100_000), st.sampled_from(["half", "interleaved"]))
def test_rotated_products_depend_on_the_distance_only(p, shift, pairs):
    torch.manual_seed(0)
    rotary = Rotary(8, pairs=pairs)
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def product(a, b):
        return float((rotary.rotate(q, at(a)) * rotary.rotate(k, at(b))).sum())

    assert product(p, p + 7) == pytest.approx(product(p + shift, p + shift + 7), abs=1e-8)
    assert float(rotary.rotate(q, at(p)).norm()) == pytest.approx(float(q.norm()), abs=1e-9)


def test_the_two_pair_conventions_are_one_map_under_a_permutation():
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    x, pos = torch.randn(2, 5, 3, 8).double(), Positions.range(2, 3, 8)
    half = Rotary(8).rotate(x[..., order], pos)
    interleaved = Rotary(8, pairs="interleaved").rotate(x, pos)
    assert torch.equal(half, interleaved[..., order])


def test_rotation_is_the_formula_and_leaves_the_other_coordinates():
    x = torch.randn(1, 1, 1, 6).double()
    y = Rotary(6, base=100.0, rotary_dim=4, pairs="interleaved").rotate(x, at(3))[0, 0, 0].tolist()
    a, b, c, d, *rest = x.flatten().tolist()
    for (u, v), (s, t), angle in (((a, b), y[0:2], 3.0), ((c, d), y[2:4], 3 * 100**-0.5)):
        assert s == pytest.approx(u * math.cos(angle) - v * math.sin(angle), abs=1e-14)
        assert t == pytest.approx(u * math.sin(angle) + v * math.cos(angle), abs=1e-14)
    assert y[4:] == rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_stay_exact_far_out_in_low_precision(dtype):
    rotary, x = Rotary(8), torch.randn(1, 1, 1, 8)
    right = rotary.rotate(x.to(dtype).double(), at(100_003))
    y = rotary.rotate(x.to(dtype), at(100_003)).double()
    angle_error = 100_003 * torch.finfo(torch.float32).eps  # angles are computed in float32 or better
    bound = (angle_error + 2 * torch.finfo(dtype).eps) * float(x.abs().max()) * 2
    assert float((y - right).abs().max()) <= bound


def test_each_scheme_overrides_the_method_it_acts_by():
    acts = {
        kind: [m for m in ("embed", "infuse", "rotate", "bias") if has(scheme, m)]
        for kind, scheme in {
            "none": NoPosition(), "sinusoidal": Sinusoidal(4), "infused": PositionInfused(4),
            "rotary": Rotary(4), "learned": Learned(4, max_context=3), "alibi": ALiBi(2), "t5": T5Bias(2),
        }.items()
    }  # fmt: skip
    assert acts == {
        "none": [], "sinusoidal": ["embed"], "infused": ["infuse"], "learned": ["embed"],
        "rotary": ["rotate"], "alibi": ["bias"], "t5": ["bias"],
    }  # fmt: skip


def test_a_learned_table_ends_with_an_error_not_with_a_wrap():
    learned = Learned(4, max_context=3)
    assert torch.equal(learned.embed(at(0, 2, -1), torch.float32)[0, :2], learned.table[[0, 2]])
    message = r"position 3 does not exist: this model has 3 positions \(0 to 2\); shorten the prompt"
    with pytest.raises(ValueError, match=message):
        learned.embed(at(1, 3), torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learned(4, max_context=0), "max_context=0 must be at least 1"),
        (lambda: Sinusoidal(5), "dim=5 must be a positive multiple of two=2"),
        (
            lambda: Sinusoidal(4, layout="interleave"),
            "unknown layout 'interleave'; did you mean 'interleaved'",
        ),
        (lambda: slopes(0), "heads=0 must be at least 1"),
        (lambda: ALiBi(3, slopes_of_heads=[1.0]), "slopes_of_heads has 1 slopes for heads=3"),
        (
            lambda: T5Bias(2, buckets=31, bidirectional=True),
            "buckets=31, max_distance=128: need an even number",
        ),
        (lambda: T5Bias(2, buckets=1), "need an even number of buckets from 2 to 1024"),
        (lambda: T5Bias(2, buckets=32, max_distance=16), "max_distance above 16 and up to 65536"),
        (lambda: Rotary(8, rotary_dim=3), "rotary_dim=3 must be even, at most head_dim=8; nearest is 2"),
        (lambda: Rotary(8, rotary_dim=10), "rotary_dim=10 must be even, at most head_dim=8; nearest is 8"),
        (lambda: Rotary(8, pairs="halves"), "unknown pairs 'halves'; did you mean 'half'"),
        (lambda: Rotary(8, scaling={"name": "yran"}), "unknown rotary scaling 'yran'; did you mean 'yarn'"),
        (
            lambda: Rotary(8, scaling={"name": "dynamic", "factor": 2.0}),
            "dynamic NTK scaling changes every angle",
        ),
        (
            lambda: Rotary(8, scaling={"name": "linear"}),
            "linear scaling needs factor; got {'name': 'linear'}",
        ),
        (
            lambda: Rotary(8, scaling={"name": "linear", "factor": 0.5}),
            "linear scaling: factor must be a number of at least 1; got 0.5",
        ),
        (lambda: Rotary(8, scaling={"name": "yarn", "factor": 2.0}), "yarn scaling needs original_context"),
        (
            lambda: Rotary(8, scaling={"name": "linear", "faktor": 2.0}),
            r"unknown argument of linear scaling 'faktor'; did you mean 'factor'",
        ),
        (lambda: Rotary(8, base=0.0), "base=0.0 must be above 1; the usual one is 10000"),
        (lambda: Rotary(8, base=math.inf), "base=inf must be above 1"),
        (
            lambda: Rotary(8, scaling={"name": "yarn", "factor": 2.0, "original_context": 0}),
            "yarn scaling: original_context must be a number above 0; got 0",
        ),
        (
            lambda: Rotary(8, scaling={"name": "yarn", "factor": 2.0, "original_context": 64, "mscale": -1}),
            "yarn scaling: mscale must be a number of at least 0; got -1",
        ),
        (
            lambda: Rotary(8, scaling={"name": "ntk", "factor": [2.0]}),
            r"ntk scaling: factor must be a number of at least 1; got \[2.0\]",
        ),
        (
            lambda: Rotary(
                8, scaling={"name": "llama3", "factor": 2, "original_context": 9, "low_freq_factor": 4}
            ),
            "llama3 scaling needs high_freq_factor above low_freq_factor",
        ),
        (
            lambda: Rotary(2, scaling={"name": "ntk", "factor": 2.0}),
            "ntk scaling needs a rotary_dim of at least 4; got 2",
        ),
        (lambda: Positions(torch.arange(3)), r"pos must have shape \(B, T\); got \(3,\)"),
    ],
)
def test_what_a_scheme_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_advance_numbers_real_tokens_after_those_before():
    pos, after = advance(torch.tensor([[5, -1, 7], [-1, -1, -1]]), torch.tensor([3, 9]))
    assert pos.index.tolist() == [[3, -1, 4], [-1, -1, -1]]
    assert after.tolist() == [5, 9]


@pytest.mark.parametrize(
    ("index", "start", "in_place"),
    [
        ([[0, 1, 2], [0, 1, 2]], 0, True),
        ([[4, 5, 6], [4, 5, 6]], 4, False),
        ([[0, 1, 2], [1, 2, 3]], None, False),
        ([[0, 1, -1], [0, 1, 2]], None, True),
        ([[-1, 0, 1], [0, 1, 2]], None, False),
        ([[-1, -1, -1], [0, 1, 2]], None, True),
    ],
)
def test_positions_know_runs_and_prompts_from_the_beginning(index, start, in_place):
    pos = Positions(torch.tensor(index))
    assert pos.start == start
    assert pos.in_place == in_place
    assert torch.equal(pos.valid, pos.index >= 0)


def test_a_range_is_what_it_would_find_out():
    made = Positions.range(3, 5, 9)
    assert made.start == Positions(made.index.clone()).start == 5
    assert made.index.tolist() == [[5, 6, 7, 8]] * 3


def test_work_on_positions_is_done_once_for_all_layers():
    pos, calls = Positions.range(1, 0, 3), []
    rotary, other = Rotary(4), Rotary(4, base=500.0)
    turn = rotary._turn
    rotary._turn = lambda *args: calls.append(args) or turn(*args)
    heads = torch.randn(1, 3, 2, 4)
    same = [rotary.rotate(heads, pos) for _ in range(3)]
    assert torch.equal(same[0], same[2])
    assert not torch.equal(other.rotate(heads, pos), same[0])
