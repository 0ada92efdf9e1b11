"""ETC equals its equations, with gradients; its labels are the paper's; reductions to ordinary attention."""

import pytest
import torch
from reference import etc as paper

from writehead.config import ModelConfig
from writehead.core.pattern import Full
from writehead.core.positions import Positions
from writehead.core.work import Call
from writehead.mixers.etc import ETC
from writehead.mixers.softmax import Softmax
from writehead.model.encoder import Encoder
from writehead.train.objective import recompute

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def disturbed(mixer):
    """Every parameter random, biases too."""
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer.double()


def weights_of(qkv, out, labels, lent):
    G, D = qkv.kv_heads, qkv.head_dim
    w = qkv.weight.unflatten(0, (-1, D)).split([qkv.heads, G, G])
    b = qkv.bias.unflatten(0, (-1, D)).split([qkv.heads, G, G])
    named = dict(zip("qkv", w, strict=True)) | dict(zip(("qb", "kb", "vb"), b, strict=True))
    more = {"out": out.weight, "ob": out.bias, "vectors": labels.vectors, "biases": labels.biases}
    both = (named["k"], named["v"]), (named["kb"], named["vb"])
    if lent is not None:
        both = tuple(t.unflatten(0, (2, G, D)).unbind() for t in (lent.weight, lent.bias))
    named |= dict(zip(("lk", "lv"), both[0], strict=True)) | dict(zip(("lkb", "lvb"), both[1], strict=True))
    return named | more


def equation(mixer, x, owner):
    return torch.stack([
        paper.etc(
            row, weights_of(mixer.qkv, mixer.out, mixer.labels, mixer.long_kv),
            weights_of(mixer.global_qkv, mixer.global_out, mixer.global_labels, mixer.global_kv),
            min(mixer.tokens, len(row)), mixer.radius, mixer.labels.clip, own, mixer.hard,
        )
        for row, own in zip(x, owner, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "radius", "projections", "hard"),
    [
        (4, 2, "pieces", False),
        (2, 3, "shared", False),
        (1, 1, "kinds", True),
        (4, 20, "pieces", True),
        (2, 0, "pieces", False),
    ],
)
def test_etc_is_its_equations_with_gradients(kv_heads, radius, projections, hard):
    sizes = {"radius": radius, "clip": 2, "tokens": 3, "span": 4}
    mixer = disturbed(ETC(8, heads=4, kv_heads=kv_heads, projections=projections, hard=hard, **sizes))
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
    pos = Positions.range(1, 0, 10)
    pos.streams["owners"] = given
    y, _ = mixer.encode(x, pos)
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
    mixer = ETC(8, heads=4, kv_heads=2, radius=30, clip=2, tokens=3, projections="shared").double()
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
    matrices = 3 * 8 * 8 + 8 * 8 + 2 * 8 * 8 + 2 * 7 * 4
    assert mixer.work(Call(tokens=12)).flops == 2 * 12 * matrices + 2 * 2 * 8 * pairs


CONFIG = {
    "vocab": 11,
    "dim": 8,
    "depth": 2,
    "kind": "encoder",
    "mixer": {"name": "etc", "heads": 2, "radius": 2, "clip": 2, "tokens": 3},
    "position": {"name": "none"},
}
OWNERS = torch.tensor([[-1, -1, -1, 0, 0, 2, 2, 1, -1], [-1, -1, -1, 1, 1, 1, 0, 0, -1]])


def a_model(**changes):
    mixer = {**CONFIG["mixer"], "hard": True}
    return Encoder(ModelConfig.from_dict({**CONFIG, "mixer": mixer, **changes})).double()


@pytest.mark.parametrize("stack", ["residual", "reversible"])
def test_a_models_layers_read_the_owners_and_learn_the_same_with_less_memory(stack):
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        model = a_model(stack={"name": stack}).train()
        if again:
            recompute(model)
        tokens = torch.randint(0, 11, (2, 9))
        tokens[1, 2] = -1  # a global token that is not there
        x, pos, _ = model(tokens, owners=OWNERS)
        gradients = torch.autograd.grad(x.square().sum(), list(model.parameters()), allow_unused=True)
        found.append([x, *(g for g in gradients if g is not None)])
        if stack == "residual":
            y = model.embedding(tokens, pos)
            for block in model.stack.blocks:
                inside = Positions(pos.index)
                inside.streams["owners"] = OWNERS
                y, _ = block.encode(y, inside)
            torch.testing.assert_close(x, model.stack.norm(y), **EXACT)
    assert (model(tokens)[0][0] - x[0]).abs().max() > 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_global_token_that_is_absent_is_as_if_it_had_never_been():
    model = a_model()
    tokens = torch.randint(0, 11, (2, 9))
    tokens[:, 1:3] = -1
    owners = torch.where(OWNERS == 0, 0, -1)
    x, pos, _ = model(tokens, owners=owners)
    assert pos.index[0].tolist() == [0, -1, -1, 3, 4, 5, 6, 7, 8]
    alone = a_model(mixer={**CONFIG["mixer"], "tokens": 1, "hard": True})
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            parameter.copy_(values[name])
    keep = [0, 3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(alone(tokens[:, keep], owners=owners[:, keep])[0], x[:, keep], **EXACT)


def test_labels_tell_the_order_without_positions_and_other_mixers_need_them():
    model = a_model(mixer={**CONFIG["mixer"], "span": 2})
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    turned = tokens[:, [0, 1, 2, 4, 3, 5, 6, 7]]
    x, y = model(tokens)[0], model(turned)[0]
    assert (x[:, 4] - y[:, 3]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="cannot tell the order of its tokens, unless a mixer does"):
        a_model(mixer={"name": "bidirectional", "heads": 2})


def with_owners(owners, index=None):
    pos = Positions.range(1, 0, 4) if index is None else Positions(index)
    pos.streams["owners"] = torch.tensor(owners)
    return ETC(8, heads=2, clip=2, tokens=2).encode(torch.randn(1, 4, 8), pos)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ETC(8, heads=2, clip=0), "radius=84, clip=0, tokens=64, span=64: radius must be at least 0"),
        (lambda: ETC(8, heads=2, projections="piece"), "did you mean 'pieces'"),
        (lambda: with_owners([[-1, 0, 0]]), "owners"),
        (lambda: with_owners([[-1, -1, 0, 2]]), "owners name position 2; only 0 to 1 are global"),
        (lambda: with_owners([[-1, 0, 0, 1]]), "positions 0 to 1 are global and want -1"),
        (lambda: a_model()(torch.ones(2, 4, dtype=torch.int64), owners=OWNERS), "owners"),
        (
            lambda: a_model(mixer={"name": "bidirectional", "heads": 2}, position={"name": "sinusoidal"})(
                torch.ones(2, 9, dtype=torch.int64), owners=OWNERS
            ),
            "none of the model's mixers reads them; `etc` does",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
