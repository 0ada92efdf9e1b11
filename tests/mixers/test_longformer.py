"""Longformer equals the paper's two softmaxes, in float64 with gradients, wherever the global tokens are; its
causal form obeys the laws."""

import pytest
import torch
from reference import patterns as paper

from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import rewind
from writehead.laws import DECODING, ENCODING, check
from writehead.mixers.longformer import Longformer
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary

T, X, H = 17, 8, 4


def reference(mixer, x, marked, sets):
    """x (T, X): local rows by the sets of each query head, the rows of `marked` by all keys (or those before)."""
    D, G = mixer.qkv.head_dim, mixer.qkv.kv_heads

    def heads(qkv, sets_of):
        q, k, v = qkv.weight.unflatten(0, (-1, D)).split([H, G, G])
        shared = [h * G // H for h in range(H)]
        return torch.cat(
            [paper.attention(x @ q[h].T, x @ k[g].T, x @ v[g].T, sets_of[h]) for h, g in enumerate(shared)], 1
        )

    causal = mixer.pattern.causal
    everything = [[set(range(i + 1 if causal else len(x))) for i in range(len(x))]] * H
    local, whole = heads(mixer.qkv, sets), heads(mixer.global_qkv, everything)
    flag = torch.tensor([i in marked for i in range(len(x))])[:, None]
    return torch.where(flag, whole, local) @ mixer.out.weight.T


def assert_same(mixer, y, right, x):
    torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(y)
    wanted = (x, mixer.qkv.weight, mixer.global_qkv.weight, mixer.out.weight)
    ours = torch.autograd.grad((y * weight).sum(), wanted, materialize_grads=True)
    theirs = torch.autograd.grad((right * weight).sum(), wanted, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.fixture(params=["dense", "tiles"])
def way(request, monkeypatch):
    """The dense form, or tiles of 4."""
    if request.param == "tiles":
        monkeypatch.setattr("writehead.ops.blocks.BLOCK", 4)
        monkeypatch.setattr("writehead.ops.whole.SPARSE", 2.0)


def made(kv_heads, **more):
    dilations = [1, 1, 2, 3][-kv_heads:]
    given = {"heads": H, "kv_heads": kv_heads, "window": 4, "dilations": dilations, "bias": "none", **more}
    return Longformer(X, **given).double(), [dilations[h * kv_heads // H] for h in range(H)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [0, 3])
def test_the_first_tokens_are_global(kv_heads, tokens):
    mixer, dilations = made(kv_heads, tokens=tokens)
    x = torch.randn(1, T, X).double().requires_grad_()
    marked = set(range(tokens))
    sets = [[paper.longformer(i, T, 4, d, marked) for i in range(T)] for d in dilations]
    y = mixer.encode(x, Positions.range(1, 0, T))[0][0]
    assert_same(mixer, y, reference(mixer, x[0], marked, sets), x)


@pytest.mark.parametrize("front", [0, 2])
def test_marked_tokens_are_global_in_rows_of_different_lengths_and_counts(front):
    mixer, dilations = made(2)
    x = torch.randn(3, T, X).double().requires_grad_()
    lengths, marks = (T, 13, 9), ({0, 7, 8}, {3}, set())
    index = torch.full((3, T + front), -1)
    marked = torch.zeros(3, T + front, dtype=torch.bool)
    for row, (length, mark) in enumerate(zip(lengths, marks, strict=True)):
        index[row, front : front + length] = torch.arange(length)
        marked[row, [front + i for i in mark]] = True
    padded = torch.cat([torch.full((3, front, X), 9.0).double(), x], 1)
    y = mixer.encode(padded, Positions(index), marked)[0]
    for row, (length, mark) in enumerate(zip(lengths, marks, strict=True)):
        sets = [[paper.longformer(i, length, 4, d, mark) for i in range(length)] for d in dilations]
        right = reference(mixer, x[row, :length], mark, sets)
        assert_same(mixer, y[row, front : front + length], right, x) if row == 0 else None
        torch.testing.assert_close(y[row, front : front + length], right, rtol=1e-11, atol=1e-12)


def test_marking_the_first_tokens_is_what_is_done_without_marks():
    mixer = Longformer(16, heads=4, window=4, tokens=2, position=Rotary(4)).double()
    x, pos = torch.randn(2, 11, 16).double(), Positions.range(2, 0, 11)
    marked = torch.arange(11).expand(2, -1) < 2
    torch.testing.assert_close(
        mixer.encode(x, pos, marked)[0], mixer.encode(x, pos)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("tokens", [0, 3])
def test_the_causal_form_looks_back(tokens):
    mixer, dilations = made(2, tokens=tokens, causal=True)
    x = torch.randn(1, T, X).double().requires_grad_()
    sets = [
        [{j for j in range(i + 1) if j < tokens or ((i - j) % d == 0 and i - j < 4 * d)} for i in range(T)]
        for d in dilations
    ]
    y = mixer(x, Positions.range(1, 0, T))[0][0]
    assert_same(mixer, y, reference(mixer, x[0], set(range(tokens)), sets), x)


@pytest.mark.parametrize("law", DECODING)
@pytest.mark.parametrize("tokens", [0, 3])
def test_the_causal_form_obeys_with_one_write_head(tokens, law):
    mixer = Longformer(16, heads=4, kv_heads=1, window=5, tokens=tokens, causal=True, position=Rotary(4))
    verdict = check(mixer, law, decodes="O(W)", seed=4)
    assert verdict.passed, verdict


@pytest.mark.parametrize("law", ENCODING)
def test_the_encoder_obeys(law):
    mixer = Longformer(16, heads=4, kv_heads=2, window=4, tokens=3, position=ALiBi(4))
    verdict = check(mixer, law, seed=4)
    assert verdict.passed, verdict


def test_the_causal_form_rewinds_into_its_global_tokens():
    mixer = Longformer(16, heads=4, window=3, tokens=6, causal=True).double()
    x, more = torch.randn(1, 8, 16).double(), torch.randn(1, 6, 16).double()
    store = Store(slack=6)
    with torch.no_grad():
        _, state, _ = mixer(x, Positions.range(1, 0, 8), mixer.init_state(1, x, store))
        y, _, _ = mixer(more, Positions.range(1, 3, 9), rewind(state, 5))
        right, _, _ = mixer(torch.cat([x[:, :3], more], 1), Positions.range(1, 0, 9))
    torch.testing.assert_close(y, right[:, 3:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Longformer(16, window=5), "for an encoder, even; nearest is 6"),
        (lambda: Longformer(16, tokens=-1), "tokens must be at least 0"),
        (lambda: Longformer(16, dilations=[1]), "need one for each of 8 key/value heads"),
        (
            lambda: Longformer(16)(torch.randn(1, 2, 16), Positions.range(1, 0, 2)),
            "reads keys after the query, so it cannot decode: use encode",
        ),
        (
            lambda: Longformer(16, causal=True).encode(
                torch.randn(1, 2, 16), Positions.range(1, 0, 2), torch.zeros(1, 2, dtype=torch.bool)
            ),
            "marked is for the encoder",
        ),
        (
            lambda: Longformer(16, position=ALiBi(8)).encode(
                torch.randn(1, 2, 16), Positions.range(1, 0, 2), torch.zeros(1, 2, dtype=torch.bool)
            ),
            "need a position scheme without a bias",
        ),
        (
            lambda: Longformer(16).encode(
                torch.randn(1, 2, 16), Positions.range(1, 0, 2), torch.zeros(1, 3, dtype=torch.bool)
            ),
            r"marked must have shape \(B=1, T=2\)",
        ),
        (
            lambda: Longformer(16).encode(
                torch.randn(1, 2, 16), Positions.range(1, 1, 3), torch.ones(1, 2, dtype=torch.bool)
            ),
            "need rows that start at position 0",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
