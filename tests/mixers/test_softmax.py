"""Softmax equals the papers' incremental form, with gradients; head sharing is copied weights, bit for
bit."""

import pytest
import torch
from reference.softmax import incremental

from writehead.core.heads import QKV
from writehead.core.pattern import Causal, Full, Leading, PerHead, Window
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.mixers.softmax import Softmax
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary


def weights_of(mixer):
    """(H, D, X), (G, D, X), (G, D, X), (X, H * D), as the reference takes them."""
    H, G, D = mixer.qkv.heads, mixer.qkv.kv_heads, mixer.qkv.head_dim
    q, k, v = mixer.qkv.weight.unflatten(0, (-1, D)).split([H, G, G])
    return q, k, v, mixer.out.weight


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("pattern", "window", "sinks"),
    [(Causal(), None, 0), (Window(3), 3, 0), (Causal() & (Window(3) | Leading(2)), 3, 2)],
)
def test_any_head_sharing_and_window_is_the_papers_incremental_form(kv_heads, pattern, window, sinks):
    mixer = Softmax(8, heads=4, kv_heads=kv_heads, head_dim=3, pattern=pattern).double()
    x = torch.randn(2, 7, 8).double().requires_grad_()
    right = torch.stack([incremental(row, *weights_of(mixer), window, sinks) for row in x])
    y, _, aux = mixer(x, Positions.range(2, 0, 7))
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    assert aux == {}
    weight, wanted = torch.randn_like(y), (x, mixer.qkv.weight, mixer.out.weight)
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((right * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_one_token_at_a_time_is_the_papers_incremental_form_too():
    mixer = Softmax(8, heads=4, kv_heads=1, pattern=Window(3)).double()
    x, state, steps = torch.randn(2, 9, 8).double(), None, []
    with torch.no_grad():
        for t in range(9):
            y, state, _ = mixer(x[:, t : t + 1], Positions.range(2, t, t + 1), state)
            steps.append(y)
        right = torch.stack([incremental(row, *weights_of(mixer), 3) for row in x])
    torch.testing.assert_close(torch.cat(steps, 1), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [None, Rotary(4), ALiBi(4)])
def test_grouped_heads_with_as_many_or_one_are_multi_head_and_multi_query_bit_for_bit(position):
    x, pos = torch.randn(2, 9, 16), Positions.range(2, 0, 9)
    for named, kv_heads in ((None, 4), (1, 1)):
        a = Softmax(16, heads=4, kv_heads=named, position=position)
        b = Softmax(16, heads=4, kv_heads=kv_heads, position=position)
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(x, pos)[0], b(x, pos)[0])


def test_multi_query_is_multi_head_whose_key_and_value_heads_are_equal():
    one, all_ = Softmax(16, heads=4, kv_heads=1).double(), Softmax(16, heads=4).double()
    q, k, v = one.qkv.weight.split([16, 4, 4])
    with torch.no_grad():
        all_.qkv.weight.copy_(torch.cat([q, k.repeat(4, 1), v.repeat(4, 1)]))
        all_.out.weight.copy_(one.out.weight)
    x, pos = torch.randn(2, 9, 16).double(), Positions.range(2, 0, 9)
    torch.testing.assert_close(one(x, pos)[0], all_(x, pos)[0], rtol=1e-13, atol=1e-13)


def test_query_head_h_reads_key_head_h_over_group_size():
    mixer = Softmax(8, heads=4, kv_heads=2).double()
    x, pos = torch.randn(1, 5, 8).double(), Positions.range(1, 0, 5)
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(8))
        before = mixer(x, pos)[0]
        mixer.qkv.weight[-2:] += 1  # the second value head
        changed = (mixer(x, pos)[0] - before).abs().amax((0, 1)) > 1e-9
    assert changed.tolist() == [False] * 4 + [True] * 4


def test_per_head_patterns_give_each_head_its_window():
    mixed = Softmax(8, heads=2, pattern=PerHead((Window(1), Window(4)))).double()
    x, pos = torch.randn(1, 9, 8).double(), Positions.range(1, 0, 9)
    with torch.no_grad():
        mixed.out.weight.copy_(torch.eye(8))
        for head, window in ((0, 1), (1, 4)):
            alone = Softmax(8, heads=2, pattern=Window(window)).double()
            alone.load_state_dict(mixed.state_dict())
            own = slice(4 * head, 4 * head + 4)
            torch.testing.assert_close(
                mixed(x, pos)[0][..., own], alone(x, pos)[0][..., own], rtol=1e-12, atol=1e-12
            )


@torch.no_grad()
def test_normalised_heads_have_a_root_mean_square_of_one_and_their_own_gains():
    qkv = QKV(16, 4, 2, norm_eps=1e-6).double()
    heads, v = qkv(torch.randn(2, 5, 16).double())
    rms = heads.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-4, atol=0)
    qkv.q_norm.weight.fill_(3.0)
    scaled = qkv(torch.randn(1, 5, 16).double())[0].pow(2).mean(-1).sqrt()[0, 0]
    torch.testing.assert_close(scaled, torch.tensor([3.0] * 4 + [1.0] * 2).double(), rtol=1e-4, atol=0)
    assert float((v.pow(2).mean(-1).sqrt() - 1).abs().max()) > 1e-2


def test_a_scale_of_one_is_the_2019_papers_convention():
    a, b = Softmax(16, heads=4, scale=1.0).double(), Softmax(16, heads=4).double()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.qkv.weight[:16] *= 2  # D ** 0.5
    x, pos = torch.randn(2, 6, 16).double(), Positions.range(2, 0, 6)
    torch.testing.assert_close(a(x, pos)[0], b(x, pos)[0], rtol=1e-12, atol=1e-12)


def test_biases_are_where_they_were_asked_for():
    names = {
        kind: {n for n, _ in Softmax(8, bias=kind).named_parameters() if n.endswith("bias")}
        for kind in ("none", "qkv", "all")
    }
    assert names == {"none": set(), "qkv": {"qkv.bias"}, "all": {"qkv.bias", "out.bias"}}


def test_long_calls_go_piece_by_piece_with_the_same_result(monkeypatch):
    mixer = Softmax(16, heads=4, kv_heads=2, pattern=Window(9) | Leading(2), position=ALiBi(4)).double()
    causal = Softmax(
        16, heads=4, kv_heads=2, pattern=Causal() & (Window(9) | Leading(2)), position=ALiBi(4)
    ).double()
    x, pos = torch.randn(2, 70, 16).double(), Positions.range(2, 0, 70)
    whole = [mixer.encode(x, pos)[0], causal(x, pos)[0]]
    monkeypatch.setattr("writehead.mixers.softmax.SCORES", 70)
    pieces = [mixer.encode(x, Positions.range(2, 0, 70))[0], causal(x, Positions.range(2, 0, 70))[0]]
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_later_piece_of_a_prompt_needs_no_mask_of_all_its_pairs(monkeypatch):
    mixer, x = Softmax(16, heads=4, kv_heads=2).double(), torch.randn(2, 150, 16).double()
    whole = mixer(x, Positions.range(2, 0, 150))[0]
    _, state, _ = mixer(x[:, :60], Positions.range(2, 0, 60))
    monkeypatch.setattr("writehead.mixers.softmax._mask", None)
    monkeypatch.setattr(torch.Tensor, "tril", None)
    with torch.no_grad():
        later, _, _ = mixer(x[:, 60:], Positions.range(2, 60, 150), state)
    torch.testing.assert_close(later, whole[:, 60:], rtol=1e-12, atol=1e-12)


def test_a_call_with_no_state_is_a_call_with_the_empty_one():
    mixer, x = Softmax(8), torch.randn(2, 5, 8)
    pos = Positions.range(2, 0, 5)
    assert torch.equal(mixer(x, pos)[0], mixer(x, pos, mixer.init_state(2, x, Store(capacity=30)))[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmax(10, heads=4), "dim=10 must be a positive multiple of heads=4; nearest is 8"),
        (
            lambda: Softmax(16, heads=4, kv_heads=3),
            "heads=4 must be a positive multiple of kv_heads=3; nearest is 3",
        ),
        (lambda: Softmax(16, heads=4, kv_heads=0), "kv_heads=0 must be at least 1"),
        (lambda: Softmax(16, heads=4, bias="qvk"), "unknown bias 'qvk'; did you mean 'qkv'"),
        (
            lambda: Softmax(16, heads=4, pattern=PerHead((Causal(), Window(2)))),
            "the pattern is for 2 heads, the mixer has heads=4",
        ),
        (
            lambda: Softmax(8, pattern=Full())(torch.randn(1, 2, 8), Positions.range(1, 0, 2)),
            r"pattern Full\(\) reads keys after the query, so it cannot decode: use encode",
        ),
        (
            lambda: Softmax(8)(torch.randn(1, 3, 8), Positions.range(1, 0, 2)),
            r"x must have shape \(B=1, T=2, X=8\); got \(1, 3, 8\)",
        ),
        (
            lambda: Softmax(8)(torch.randn(1, 2, 9), Positions.range(1, 0, 2)),
            r"x must have shape \(B=1, T=2, X=8\); got \(1, 2, 9\)",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
