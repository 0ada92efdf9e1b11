"""Mixers with fixed patterns equal their papers' sets, in float64 with gradients; many heads, groups and
one."""

import pytest
import torch
from reference import patterns as paper

from writehead.core.pattern import Image2D
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import tensors
from writehead.laws import DECODING, check
from writehead.mixers.axial import Axial
from writehead.mixers.big_bird import BigBird
from writehead.mixers.block_bert import BlockBERT, favoured
from writehead.mixers.image_transformer import ImageTransformer1D, ImageTransformer2D
from writehead.mixers.longformer import Longformer
from writehead.mixers.sparse_transformer import SparseTransformer
from writehead.ops.attend import attend

T, X, H = 26, 8, 4


def weights_of(mixer):
    G, D = mixer.qkv.kv_heads, mixer.qkv.head_dim
    return *mixer.qkv.weight.unflatten(0, (-1, D)).split([mixer.qkv.heads, G, G]), mixer.out.weight


def assert_is(mixer, sets, causal=True, length=T):
    """The mixer's call, or `encode`, against loops over the sets of each query head."""
    mixer = mixer.double()
    for bias in (mixer.qkv.bias, mixer.out.bias):
        assert bias is None or not bias.any()
    x, pos = (
        torch.randn(1, length, mixer.qkv.weight.shape[1]).double().requires_grad_(),
        Positions.range(1, 0, length),
    )
    y = mixer(x, pos)[0] if causal else mixer.encode(x, pos)[0]
    right = paper.layer(x[0], weights_of(mixer), sets)[None]
    torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-12)
    weight, wanted = torch.randn_like(y), (x, mixer.qkv.weight, mixer.out.weight)
    ours = torch.autograd.grad((y * weight).sum(), wanted)
    theirs = torch.autograd.grad((right * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.fixture(params=["dense", "tiles"])
def way(request, monkeypatch):
    """The dense form, or tiles of 4."""
    if request.param == "tiles":
        monkeypatch.setattr("writehead.ops.blocks.BLOCK", 4)
        monkeypatch.setattr("writehead.ops.whole.SPARSE", 2.0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("use", ["merged", "near", "far", "heads"])
def test_sparse_transformer_reads_the_papers_sets(kv_heads, use):
    def sets(of):
        halves = [(0, 1)[g % 2] if use == "heads" else use for g in range(kv_heads)]
        chosen = [halves[h * kv_heads // H] for h in range(H)]
        pick = {"merged": lambda a, b: a | b, "near": lambda a, b: a, "far": lambda a, b: b}
        pick |= {0: pick["near"], 1: pick["far"]}
        return [[pick[c](*of(i, h * kv_heads // H)) for i in range(T)] for h, c in enumerate(chosen)]

    args = {"heads": H, "kv_heads": kv_heads, "stride": 6, "use": use}
    assert_is(SparseTransformer(X, kind="strided", **args), sets(lambda i, g: paper.strided(i, 6)))
    mixer = SparseTransformer(X, kind="fixed", columns=2, parts=3, **args)
    assert_is(mixer, sets(lambda i, g: paper.fixed(i, 6, 2, g % 3)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("length", [24, 26])
def test_block_bert_reads_the_papers_blocks(kv_heads, length):
    mixer = BlockBERT(12, heads=3, kv_heads=kv_heads, blocks=3, shifts=[0, 1, 2][:kv_heads], bias="none")
    shifts = [0, 1, 2] if kv_heads == 3 else [0, 0, 0]
    sets = [[paper.block_bert(i, length, 3, s) for i in range(length)] for s in shifts]
    assert_is(mixer, sets, causal=False, length=length)


def test_block_bert_with_one_block_is_full_attention_and_favours_the_own_block():
    mixer = BlockBERT(X, heads=H, blocks=1, bias="none")
    assert_is(mixer, [[set(range(T))] * T] * H, causal=False)
    assert favoured(2, 12) == [0] * 10 + [1] * 2
    assert favoured(3, 12) == [0] * 8 + [1] * 2 + [2] * 2
    assert favoured(3, 1) == [0]


def test_permuting_blocks_and_conjugating_the_shift_permutes_the_output():
    one, other = (BlockBERT(X, heads=2, blocks=3, shifts=[s, s], bias="none").double() for s in (1, 2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 12, X).double()
    swapped = x.view(1, 3, 4, X)[:, [0, 2, 1]].flatten(1, 2)  # turns +1 into +2 modulo 3
    pos = Positions.range(1, 0, 12)
    right = one.encode(x, pos)[0].view(1, 3, 4, X)[:, [0, 2, 1]].flatten(1, 2)
    torch.testing.assert_close(other.encode(swapped, pos)[0], right, rtol=1e-12, atol=1e-12)


def test_the_causal_block_bert_looks_back_or_at_itself():
    mixer = BlockBERT(12, heads=3, blocks=3, block=4, shifts=[0, 1, 2], bias="none")
    own = [
        [{j for j in range(i + 1) if j // 4 == (i // 4 - s if i // 4 >= s else i // 4)} for i in range(T)]
        for s in range(3)
    ]
    assert_is(mixer, own)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_image_transformer_reads_the_papers_sets_in_one_dimension(kv_heads):
    mixer = ImageTransformer1D(X, heads=H, kv_heads=kv_heads, block=5, memory=7)
    assert_is(mixer, [[paper.image_1d(i, 5, 7) for i in range(T)]] * H)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("block", "margin"), [((2, 3), (2, 3)), ((2, 2), (3, 1)), ((1, 6), (2, 0)), ((3, 2), (1, 4))]
)
def test_image_transformer_reads_the_papers_sets_in_two_dimensions(block, margin):
    mixer = ImageTransformer2D(X, heads=2, kv_heads=1, image_width=6, patch=list(block), margin=list(margin))
    sets = paper.image_2d(6, 6, block, margin)
    assert_is(mixer, [sets] * 2, length=36)
    live = max(len({j for i in range(t, 36) for j in sets[i] if j < t}) for t in range(36))
    assert live <= 6 * margin[0] + block[0] * (block[1] + margin[1])
    assert live <= mixer.pattern.reach.window


def test_blocked_raster_order_and_pixels_translate_into_each_other():
    pattern = Image2D(8, 2, 4, 2, 4)
    at = torch.arange(48)
    row, column = pattern.pixel(at)
    assert torch.equal(pattern.position(row, column), at)
    assert list(zip(row[:9].tolist(), column[:9].tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (0, 4),
    ]  # fmt: skip


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_axial_attention_is_dense_attention_along_one_axis_of_the_image(axis, causal):
    mixer = Axial(X, heads=H, kv_heads=2, image_width=5, axis=axis, causal=causal, bias="none").double()
    q, k, v, out = weights_of(mixer)
    x, pos = torch.randn(2, 30, X).double(), Positions.range(2, 0, 30)
    lines = x.view(2, 6, 5, X) if axis == 1 else x.view(2, 6, 5, X).transpose(1, 2)
    heads = []
    for h in range(H):
        scores = (lines @ q[h].T) @ (lines @ k[h // 2].T).transpose(-1, -2) / q.shape[1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ (lines @ v[h // 2].T))
    right = torch.cat(heads, -1) @ out.T
    right = (right if axis == 1 else right.transpose(1, 2)).reshape(2, 30, X)
    y = mixer(x, pos)[0] if causal else mixer.encode(x, pos)[0]
    torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("length", [24, 23, 9, 3])
def test_big_bird_reads_the_papers_blocks(kv_heads, length):
    mixer = BigBird(X, heads=H, kv_heads=kv_heads, block=3, random=2, seed=5, bias="none")
    pattern = mixer.pattern_for(length)
    blocks = -(-length // 3)
    sets = []
    for h in range(H):
        seen = pattern.head(h).allows(torch.arange(length)[:, None], torch.arange(length))
        drawn = {}
        for a in range(1, blocks - 1):
            read = {j // 3 for j in seen[3 * a].nonzero().flatten().tolist()}
            drawn[a] = sorted(read - {0, a - 1, a, a + 1, blocks - 1})
            free = blocks - len({0, a - 1, a, a + 1, blocks - 1})
            assert len(drawn[a]) == min(2, free)
        sets.append([paper.big_bird(i, length, 3, drawn) for i in range(length)])
    if kv_heads == 4 and length == 24:
        assert sets[0] != sets[1] != sets[2]
    assert_is(mixer, sets, causal=False, length=length)


def test_random_blocks_of_the_causal_form_do_not_depend_on_the_length():
    mixer = BigBird(X, heads=H, block=3, random=2, causal=True)
    assert mixer.pattern_for(9) == mixer.pattern_for(900) == mixer.pattern
    seen = mixer.pattern.head(1).allows(torch.tensor([[300]]), torch.arange(400))[0]
    read = {j // 3 for j in seen.nonzero().flatten().tolist()}
    assert {0, 99, 100} < read
    assert len(read) == 5
    assert max(read) == 100


MULTI_QUERY = {
    "strided": lambda g=1: SparseTransformer(16, heads=4, kv_heads=g, kind="strided", stride=5),
    "fixed": lambda g=1: SparseTransformer(16, heads=4, kv_heads=g, stride=5, columns=2),
    "fixed with parts": lambda g=2: SparseTransformer(16, heads=4, kv_heads=g, stride=6, columns=2, parts=2),
    "halves by heads": lambda g=2: SparseTransformer(
        16, heads=4, kv_heads=g, stride=4, columns=1, use="heads"
    ),
    "block": lambda g=1: BlockBERT(16, heads=4, kv_heads=g, blocks=3, block=4, shifts=[2] * g),
    "image 1d": lambda g=1: ImageTransformer1D(16, heads=4, kv_heads=g, block=4, memory=3),
    "image 2d": lambda g=1: ImageTransformer2D(
        16, heads=4, kv_heads=g, image_width=6, patch=[2, 3], margin=[1, 2]
    ),
    "columns": lambda g=1: Axial(16, heads=4, kv_heads=g, image_width=5, causal=True),
    "rows": lambda g=1: Axial(16, heads=4, kv_heads=g, image_width=5, axis=1, causal=True),
    "big bird": lambda g=1: BigBird(16, heads=4, kv_heads=g, block=3, random=1, causal=True),
    "longformer": lambda g=1: Longformer(16, heads=4, kv_heads=g, window=5, tokens=2, causal=True),
}
GROWS = {
    "rows": "O(W)", "block": "O(W)", "image 1d": "O(W)", "image 2d": "O(W)", "longformer": "O(W)", "fixed": "O(S/W)",
    "fixed with parts": "O(S/W)",
}  # fmt: skip


@pytest.mark.parametrize("law", DECODING)
@pytest.mark.parametrize("name", MULTI_QUERY)
def test_one_write_head_obeys_the_laws_and_grows_as_its_row_says(name, law):
    verdict = check(MULTI_QUERY[name](), law, decodes=GROWS.get(name, "O(S)"), seed=2)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", [name for name, make in MULTI_QUERY.items() if make().qkv.kv_heads == 1])
def test_one_write_head_keeps_a_quarter_of_four(name):
    x, pos = torch.randn(2, 50, 16), Positions.range(2, 0, 50)
    one, four = (
        sum(t.nbytes for t in tensors(MULTI_QUERY[name](g)(x, pos)[1]) if t.is_floating_point())
        for g in (1, 4)
    )
    assert 4 * one == four


def test_the_fixed_form_keeps_a_block_and_the_columns_of_those_before_it():
    mixer = SparseTransformer(16, heads=4, stride=16, columns=4)
    x = torch.randn(1, 160, 16)
    _, state, _ = mixer(x, Positions.range(1, 0, 160), mixer.init_state(1, x, Store(capacity=160)))
    assert state.k.shape[2] == 12 + 4 * 10
    kept = sorted(p for p in state.pos[0].tolist() if p >= 0)
    assert [p for p in kept if p < 144] == [p for p in range(144) if p % 16 >= 12]
    assert [p for p in kept if p >= 144] == list(range(144, 160))


def test_a_strided_step_reads_the_window_and_the_stride_only(monkeypatch):
    mixer = SparseTransformer(16, heads=4, kind="strided", stride=8)
    x, read = torch.randn(1, 65, 16), []
    _, state, _ = mixer(x[:, :64], Positions.range(1, 0, 64))

    def spy(q, k, v, **rest):
        read.append(k.shape[1])
        return attend(q, k, v, **rest)

    monkeypatch.setattr("writehead.mixers.softmax.attend", spy)
    mixer(x[:, 64:], Positions.range(1, 64, 65), state)
    assert read == [8 + 8]  # the window, and eight keys before it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseTransformer(8, kind="stride"), "unknown kind 'stride'; did you mean 'strided'"),
        (lambda: SparseTransformer(8, use="both"), "unknown use 'both'"),
        (lambda: SparseTransformer(8, stride=8, columns=4, parts=3), "a block has parts 0 to 1"),
        (
            lambda: BlockBERT(8, heads=2, blocks=2, shifts=[0, 2]),
            "need one for each of 2 key/value heads, from 0 to 1",
        ),
        (lambda: BlockBERT(8, heads=2, shifts=[0]), "need one for each of 2"),
        (lambda: ImageTransformer2D(8, patch=[4]), "must be two numbers each"),
        (
            lambda: ImageTransformer2D(8, image_width=30),
            "width=30 must be a positive multiple of columns=16; nearest is 32",
        ),
        (lambda: Axial(8, axis=2), r"axis must be 0 \(columns\) or 1 \(rows\)"),
        (lambda: BigBird(16, block=0), "block must be at least 1, the others 0"),
        (
            lambda: BigBird(16)(torch.randn(1, 2, 16), Positions.range(1, 0, 2)),
            "reads keys after the query, so it cannot decode: use encode",
        ),
    ],
)
def test_what_these_mixers_refuse_they_say(make, message):
    with pytest.raises(ValueError, match=message):
        make()
