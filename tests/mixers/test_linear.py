"""Linear attention equals the paper's recurrence with gradients; what the state holds; what is refused."""

import pytest
import torch
from reference.linear import bidirectional, elu_plus_one, project, recurrence
from torch.utils.flop_counter import FlopCounterMode

from writehead.core.bind import bound
from writehead.core.positions import Positions
from writehead.core.state import CannotRewind, nbytes, rewind, select
from writehead.core.work import Call
from writehead.mixers.linear import Linear
from writehead.mixers.performer import Performer
from writehead.mixers.rfa import GatedRFA
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary
from writehead.positions.sinusoidal import PositionInfused


def weights_of(mixer):
    """(H, D, X), (G, D, X), (G, D, X), as the reference takes them."""
    H, G, D = mixer.qkv.heads, mixer.qkv.kv_heads, mixer.qkv.head_dim
    return mixer.qkv.weight.unflatten(0, (-1, D)).split([H, G, G])


def expected(mixer, x, causal=True):
    rows = []
    for row in x:
        q, k, v = project(row, *weights_of(mixer))
        form = recurrence if causal else bidirectional
        rows.append(form(elu_plus_one(q), elu_plus_one(k), v, lambda total: total + 1e-6).flatten(1))
    return torch.stack(rows) @ mixer.out.weight.T


def assert_equal_with_gradients(ours, theirs, wanted):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(ours)
    a = torch.autograd.grad((ours * weight).sum(), wanted)
    b = torch.autograd.grad((theirs * weight).sum(), wanted)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_any_head_sharing_is_the_papers_recurrence(kv_heads):
    mixer = Linear(8, heads=4, kv_heads=kv_heads, head_dim=3).double()
    x = torch.randn(2, 7, 8).double().requires_grad_()
    y, _, aux = mixer(x, Positions.range(2, 0, 7))
    assert aux == {}
    assert_equal_with_gradients(y, expected(mixer, x), (x, mixer.qkv.weight, mixer.out.weight))


def test_a_sequence_of_several_chunks_is_the_papers_recurrence():
    mixer = Linear(4, heads=2, kv_heads=1).double()
    x = torch.randn(1, 300, 4).double().requires_grad_()
    y, _, _ = mixer(x, Positions.range(1, 0, 300))
    assert_equal_with_gradients(y, expected(mixer, x), (x, mixer.qkv.weight))


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_an_encoder_normalises_explicit_weights(kv_heads):
    mixer = Linear(8, heads=4, kv_heads=kv_heads).double()
    x = torch.randn(2, 6, 8).double().requires_grad_()
    y, _ = mixer.encode(x, Positions.range(2, 0, 6))
    assert_equal_with_gradients(y, expected(mixer, x, causal=False), (x, mixer.qkv.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_kept_in_float32_or_wider_whatever_the_models_type(dtype):
    mixer = Linear(8, heads=2).to(dtype)
    y, state, _ = mixer(torch.randn(1, 5, 8).to(dtype), Positions.range(1, 0, 5))
    assert y.dtype == dtype
    assert state.sums.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert nbytes(state) == mixer.state_bytes(1, 5, dtype.itemsize)


def test_many_low_precision_tokens_do_not_stop_counting():
    mixer = Linear(8, heads=1).to(torch.bfloat16)
    x = torch.randn(1, 1, 8).to(torch.bfloat16).expand(1, 2000, 8)
    with torch.no_grad():
        _, state, _ = mixer(x, Positions.range(1, 0, 2000))
        _, one, _ = mixer(x[:, :1], Positions.range(1, 0, 1))
    torch.testing.assert_close(state.sums.s, 2000 * one.sums.s, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [Linear, Performer, GatedRFA])
def test_one_write_head_divides_the_state_by_the_number_of_heads(make):
    sizes = {g: make(32, heads=8, kv_heads=g).state_bytes(3, 1000, 4) for g in (8, 2, 1)}
    assert sizes[8] == 4 * sizes[2] == 8 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("make", [Linear, Performer, GatedRFA])
def test_the_state_is_as_large_after_64_thousand_tokens_as_after_one_thousand(make):
    mixer = make(8, heads=2, kv_heads=1, **({} if make is Linear else {"features": 4}))
    state, sizes = None, {}
    with torch.no_grad():
        for start, stop in ((0, 1024), (1024, 65536)):
            x = torch.randn(1, stop - start, 8)
            _, state, _ = mixer(x, Positions.range(1, start, stop), state)
            sizes[stop] = nbytes(state)
    assert sizes[1024] == sizes[65536] == mixer.state_bytes(1, 65536, 4)


def test_a_sum_cannot_rewind_and_a_copy_of_it_can_be_continued():
    mixer, x = Linear(8, heads=2), torch.randn(1, 6, 8)
    with torch.no_grad():
        _, state, _ = mixer(x[:, :4], Positions.range(1, 0, 4))
        copy = select(state, torch.tensor([0]))
        right, state, _ = mixer(x[:, 4:5], Positions.range(1, 4, 5), state)
        with pytest.raises(
            CannotRewind, match="a summary of the past cannot rewind; keep a copy with select"
        ):
            rewind(state, 1)
        again, _, _ = mixer(x[:, 4:5], Positions.range(1, 4, 5), copy)
    assert torch.equal(again, right)


def test_positions_turn_queries_and_keys_before_the_feature_map():
    x, later = torch.randn(1, 5, 16).double(), Positions.range(1, 100, 105)
    plain, turned = (Linear(16, heads=4, position=p).double() for p in (None, Rotary(4)))
    turned.load_state_dict(plain.state_dict())
    y, _, _ = turned(x, later)
    q, k, v = project(x[0], *weights_of(plain))
    q, k = (turned.position.rotate(t[None], later)[0] for t in (q, k))
    right = recurrence(elu_plus_one(q), elu_plus_one(k), v, lambda total: total + 1e-6).flatten(1)
    torch.testing.assert_close(y[0], right @ plain.out.weight.T, rtol=1e-11, atol=1e-12)
    infused = Linear(16, heads=4, position=PositionInfused(16)).double()
    infused.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(infused(x, later)[0], plain(x, later)[0])


@pytest.mark.parametrize("make", [Linear, Performer, GatedRFA])
@pytest.mark.parametrize(("tokens", "context"), [(1, 9), (7, 0), (300, 4)])
def test_the_work_stated_is_what_torch_counts(make, tokens, context):
    mixer = make(16, heads=4, kv_heads=2)
    with torch.no_grad():
        state = mixer.init_state(2, torch.zeros(1))
        x, pos = torch.randn(2, tokens, 16), Positions.range(2, context, context + tokens)
        with FlopCounterMode(display=False) as counter:
            mixer(x, pos, state)
    work = mixer.work(Call(batch=2, tokens=tokens, context=context))
    assert work.flops == counter.get_total_flops()
    assert work.state_read == work.state_written == nbytes(state)


@pytest.mark.parametrize("make", [Linear, Performer, GatedRFA])
def test_an_engine_that_binds_the_parts_computes_the_same(make):
    mixer, x = make(16, heads=4, kv_heads=2), torch.randn(2, 5, 16)
    with torch.no_grad():
        right, state, _ = mixer(x, Positions.range(2, 0, 5))
        y, mine, _ = mixer.bind(bound)(x, Positions.range(2, 0, 5))
        assert torch.equal(y, right)
        now = Positions.range(2, 5, 6)
        assert torch.equal(mixer.bind(bound)(x[:, :1], now, mine)[0], mixer(x[:, :1], now, state)[0])


@pytest.mark.parametrize("tokens", [1, 6])
def test_only_a_gate_that_learns_still_gets_its_gradient(tokens):
    mixer = GatedRFA(8, heads=2, features=4).requires_grad_(False)
    mixer.gate.requires_grad_(True)
    y, state, _ = mixer(torch.randn(1, tokens, 8), Positions.range(1, 0, tokens))
    (state.sums.s.sum() + y.sum()).backward()
    assert float(mixer.gate.weight.grad.abs().max()) > 0


def test_autocast_does_not_shorten_the_sums():
    mixer, x = Linear(16, heads=4), torch.randn(1, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state, _ = mixer(x, Positions.range(1, 0, 40))
        y.float().sum().backward()
        with torch.no_grad():
            _, state, _ = mixer(x[:, :1], Positions.range(1, 40, 41), state)
    assert state.sums.s.dtype == torch.float32
    right, _, _ = mixer(x, Positions.range(1, 0, 40))
    torch.testing.assert_close(y.float(), right, rtol=0.05, atol=0.05)
    assert mixer.qkv.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(8, heads=4, kv_heads=3), "heads=4 must be a positive multiple of kv_heads=3; nearest is 3"),
        (lambda: Linear(8, heads=4, bias="some"), "unknown bias 'some'"),
        (lambda: Linear(8, heads=4, position=ALiBi(4)), "ALiBi positions add to scores, which attention through features does not have; use rotary"),
        (lambda: Linear(8, heads=4)(torch.randn(1, 2, 7), Positions.range(1, 0, 2)), r"x must have shape \(B=1, T=2, X=8\)"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
