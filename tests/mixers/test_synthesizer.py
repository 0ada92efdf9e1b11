"""Every Synthesizer equals its equation; scores taken from queries and keys give back softmax attention."""

import pytest
import torch
from reference.synthesizer import dense, outer, synthesize

from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import nbytes
from writehead.mixers.softmax import Softmax
from writehead.mixers.synthesizer import MEMBERS, Synthesizer

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def members_of(mixer, row):
    """For each member the scores of every head."""
    H, G, D = mixer.qkv.heads, mixer.qkv.kv_heads, mixer.qkv.head_dim
    found = []
    for name in mixer.members:
        if name == "dot":
            q, k, _ = mixer.qkv.weight.unflatten(0, (-1, D)).split([H, G, G])
            found.append([row @ q[h].T @ (row @ k[h // (H // G)].T).T / D**0.5 for h in range(H)])
            continue
        part = mixer.scores[name]
        if name in ("random", "factorised_random"):
            left, right = part.left, part.right
            found.append([left[h] if right is None else left[h] @ right[h].T for h in range(H)])
            continue
        w1 = part.inner.weight.unflatten(0, part.shape)
        b1 = part.inner.bias.view(part.shape)
        factors = [
            [dense(row, w1[i, h], b1[i, h], w2[h], b2[h]) for h in range(H)]
            for i, (w2, b2) in enumerate(zip(part.outer, part.bias, strict=True))
        ]
        found.append(
            factors[0] if len(factors) == 1 else [outer(a, c) for a, c in zip(*factors, strict=True)]
        )
    return found


def right_of(mixer, x, causal):
    G, D = mixer.qkv.kv_heads, mixer.qkv.head_dim
    v = mixer.qkv.weight[-G * D :].unflatten(0, (G, D))
    mix = torch.ones(1).double() if mixer.mix is None else mixer.mix.softmax(0)
    rows = [synthesize(row, v, mixer.out.weight, members_of(mixer, row), mix, causal) for row in x]
    return torch.stack(rows)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(
    "members", [*[(m,) for m in MEMBERS], ("random", "dot"), ("dense", "factorised_dense")]
)
def test_every_member_and_mixture_is_the_papers_equation_with_its_gradients(members, kv_heads):
    mixer = Synthesizer(8, heads=4, kv_heads=kv_heads, max_context=12, members=members, rank=2).double()
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if "bias" in name or name == "mix":
                p.normal_()
    x, pos = torch.randn(2, 7, 8).double().requires_grad_(), Positions.range(2, 0, 7)
    for y, causal in ((mixer(x, pos)[0], True), (mixer.encode(x, pos)[0], False)):
        right = right_of(mixer, x, causal)
        torch.testing.assert_close(y, right, **EXACT)
        weight, wanted = torch.randn_like(y), (x, *mixer.parameters())
        ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
        for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_a_table_of_the_products_of_queries_and_keys_is_softmax_attention():
    softmax = Softmax(8, heads=2).double()
    mixer = Synthesizer(8, heads=2, max_context=6, members=("random",)).double()
    q, k, v = softmax.qkv.weight.unflatten(0, (-1, 4)).split([2, 2, 2])
    x, pos = torch.randn(1, 6, 8).double(), Positions.range(1, 0, 6)
    with torch.no_grad():
        for h in range(2):
            mixer.scores["random"].left[h] = (x[0] @ q[h].T) @ (x[0] @ k[h].T).T / 2
        mixer.qkv.weight.copy_(v.flatten(0, 1))
        mixer.out.weight.copy_(softmax.out.weight)
        torch.testing.assert_close(mixer(x, pos)[0], softmax(x, pos)[0], **EXACT)


def test_all_of_the_weight_on_one_member_gives_that_member():
    both = Synthesizer(8, heads=2, max_context=9, members=("random", "dot")).double()
    softmax = Softmax(8, heads=2).double()
    x, pos = torch.randn(2, 9, 8).double(), Positions.range(2, 0, 9)
    with torch.no_grad():
        both.mix.copy_(torch.tensor([-800.0, 0.0]))
        softmax.qkv.weight.copy_(both.qkv.weight)
        softmax.out.weight.copy_(both.out.weight)
        torch.testing.assert_close(both(x, pos)[0], softmax(x, pos)[0], **EXACT)


@pytest.mark.parametrize(("members", "halves"), [(("dense",), 1), (("dense", "dot"), 2)])
def test_only_a_dot_member_keeps_keys(members, halves):
    mixer = Synthesizer(8, heads=4, kv_heads=2, max_context=64, members=members)
    with torch.no_grad():
        state = mixer(torch.randn(3, 16, 8), Positions.range(3, 0, 16))[1]
    assert nbytes(state) == mixer.state_bytes(3, 16, 4) == 3 * 16 * (2 * 2 * 4 * halves + 8)


def test_values_without_keys_may_be_kept_in_a_byte_each():
    mixer, x = Synthesizer(8, heads=2, members=("dense",)), torch.randn(2, 9, 8)
    with torch.no_grad():
        y, state, _ = mixer(x, Positions.range(2, 0, 9), mixer.init_state(2, x, Store(dtype=torch.int8)))
        right = mixer(x, Positions.range(2, 0, 9))[0]
    assert nbytes(state) == mixer.state_bytes(2, 9, 4, Store(dtype=torch.int8))
    assert 1e-6 < float((y - right).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Synthesizer(8, members=("densee",)), "unknown member 'densee'; did you mean 'dense'"),
        (lambda: Synthesizer(8, members=()), r"members=\[\] must name one or more kinds, each once"),
        (lambda: Synthesizer(8, members=("dot", "dot")), r"members=\['dot', 'dot'\] must name one or more"),
        (lambda: Synthesizer(8, rank=0), "max_context=512 and rank=0 must both be at least 1"),
        (
            lambda: Synthesizer(8, max_context=2)(torch.randn(1, 3, 8), Positions.range(1, 0, 3)),
            r"position 2 does not exist: this mixer has 2 positions \(0 to 1\)",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
