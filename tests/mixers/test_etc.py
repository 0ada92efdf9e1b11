"""ETC equals its equations, with gradients; its labels are the paper's; reductions to ordinary attention."""

import pytest
import torch
from reference import etc as paper

from writehead.core.pattern import Full
from writehead.core.positions import Positions
from writehead.core.work import Call
from writehead.mixers.etc import ETC
from writehead.mixers.softmax import Softmax

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def disturbed(mixer):
    """Every parameter random, biases too."""
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer.double()


def weights_of(qkv, out, labels):
    G, D = qkv.kv_heads, qkv.head_dim
    w = qkv.weight.unflatten(0, (-1, D)).split([qkv.heads, G, G])
    b = qkv.bias.unflatten(0, (-1, D)).split([qkv.heads, G, G])
    named = dict(zip("qkv", w, strict=True)) | dict(zip(("qb", "kb", "vb"), b, strict=True))
    more = {"out": out.weight, "ob": out.bias, "vectors": labels.vectors, "biases": labels.biases}
    return named | more


def equation(mixer, x, owner):
    return torch.stack([
        paper.etc(
            row, weights_of(mixer.qkv, mixer.out, mixer.labels),
            weights_of(mixer.global_qkv, mixer.global_out, mixer.global_labels),
            min(mixer.tokens, len(row)), mixer.radius, mixer.labels.clip, own, mixer.hard,
        )
        for row, own in zip(x, owner, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "radius", "shared", "hard"),
    [
        (4, 2, False, False),
        (2, 3, True, False),
        (1, 1, False, True),
        (4, 20, False, True),
        (2, 0, False, False),
    ],
)
def test_etc_is_its_equations_with_gradients(kv_heads, radius, shared, hard):
    mixer = disturbed(
        ETC(8, heads=4, kv_heads=kv_heads, radius=radius, clip=2, tokens=3, span=4, shared=shared, hard=hard)
    )
    x = torch.randn(2, 14, 8).double().requires_grad_()
    y, _ = mixer.encode(x, Positions.range(2, 0, 14))
    right = equation(mixer, x, [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]] * 2)
    torch.testing.assert_close(y, right, **EXACT)
    weight, wanted = torch.randn_like(y), (x, *mixer.parameters())
    ours = torch.autograd.grad((y * weight).sum(), wanted)
    theirs = torch.autograd.grad((right * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hard", [False, True])
def test_a_structure_that_is_given_says_which_words_belong_to_which_sentence(hard):
    mixer = disturbed(ETC(8, heads=2, radius=2, clip=3, tokens=3, hard=hard))
    x = torch.randn(1, 10, 8).double()
    owner = [1, 1, 2, -1, 2, 0, 1]
    given = torch.tensor([[-1, -1, -1, *owner]])
    y, _ = mixer.encode(x, Positions.range(1, 0, 10), given)
    torch.testing.assert_close(y, equation(mixer, x, [owner]), **EXACT)
    assert (y - mixer.encode(x, Positions.range(1, 0, 10))[0]).abs().max() > 1e-3


def test_rows_may_be_shorter_than_the_global_tokens_and_padded_anywhere():
    mixer = disturbed(ETC(8, heads=2, radius=1, clip=2, tokens=4, span=2))
    x = torch.randn(2, 9, 8).double()
    index = torch.tensor([[-1, 0, 1, -1, 2, -1, -1, -1, -1], [0, 1, 2, 3, 4, 5, -1, 6, 7]])
    y, _ = mixer.encode(x, Positions(index))
    for row in range(2):
        real = index[row] >= 0
        alone = equation(mixer, x[row : row + 1, real], [[0, 0, 1, 1]])
        torch.testing.assert_close(y[row, real], alone[0], **EXACT)


def test_the_labels_of_distances_are_those_of_the_papers_code():
    labels = ETC(8, heads=2, clip=3).labels
    at = torch.arange(6)
    found = labels.distance(at[:, None], at)
    assert found[0].tolist() == [0, 1, 2, 3, 3, 3]
    assert found[1].tolist() == [4, 0, 1, 2, 3, 3]
    assert found[5].tolist() == [6, 6, 6, 5, 4, 0]


def test_without_labels_and_with_shared_projections_it_is_attention_of_all_to_all():
    mixer = ETC(8, heads=4, kv_heads=2, radius=30, clip=2, tokens=3, shared=True).double()
    full = Softmax(8, heads=4, kv_heads=2, bias="all", pattern=Full()).double()
    with torch.no_grad():
        for labels in (mixer.labels, mixer.global_labels):
            labels.vectors.zero_()
        for ours, theirs in ((full.qkv, mixer.qkv), (full.out, mixer.out)):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    x, pos = torch.randn(2, 11, 8).double(), Positions.range(2, 0, 11)
    torch.testing.assert_close(mixer.encode(x, pos)[0], full.encode(x, pos)[0], **EXACT)


def test_its_work_counts_the_pairs_that_are_read():
    mixer = ETC(8, heads=2, radius=2, clip=2, tokens=3)
    long = sum(min(i, 2) + min(8 - i, 2) + 1 for i in range(9))
    pairs = long + 9 * 3 + 3 * 12
    matrices = 3 * 8 * 8 + 8 * 8 + 2 * 7 * 4
    assert mixer.work(Call(tokens=12)).flops == 2 * 12 * matrices + 2 * 2 * 8 * pairs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ETC(8, heads=2, clip=0), "radius=84, clip=0, tokens=64, span=64: radius must be at least 0"),
        (
            lambda: ETC(8, heads=2).encode(
                torch.randn(1, 4, 8), Positions.range(1, 0, 4), torch.zeros(1, 3, dtype=torch.int64)
            ),
            "owners",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
