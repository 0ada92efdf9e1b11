"""Nystromformer equals its equations for any length, and transformers' attention with copied weights."""

import pytest
import torch
from reference.nystromformer import nystrom

from writehead.core.pattern import Full
from writehead.core.positions import Positions
from writehead.mixers.nystromformer import Nystromformer, pseudo_inverse
from writehead.mixers.softmax import Softmax

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def reference(mixer, row):
    """One row (T, X) -> (T, X)."""
    H, G, D = mixer.qkv.heads, mixer.qkv.kv_heads, mixer.qkv.head_dim
    qkv = row @ mixer.qkv.weight.T + (0 if mixer.qkv.bias is None else mixer.qkv.bias)
    q, k, v = qkv.unflatten(1, (-1, D)).split([H, G, G], 1)
    heads = []
    for h in range(H):
        g, kernel = h // (H // G), None if mixer.conv is None else mixer.conv[h]
        heads.append(nystrom(q[:, h], k[:, g], v[:, g], mixer.landmarks, mixer.iterations, kernel))
    return mixer.out(torch.cat(heads, -1))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("length", "landmarks", "kernel"), [(12, 4, 3), (11, 4, None), (4, 4, 5), (13, 5, 33), (3, 4, 3)]
)
def test_any_length_is_the_papers_equation_with_its_gradients(kv_heads, length, landmarks, kernel):
    mixer = Nystromformer(
        8, heads=4, kv_heads=kv_heads, bias="all", landmarks=landmarks, kernel=kernel
    ).double()
    with torch.no_grad():
        mixer.qkv.bias.normal_()
    x = torch.randn(2, length, 8).double().requires_grad_()
    right = torch.stack([reference(mixer, row) for row in x])
    y, aux = mixer.encode(x, Positions.range(2, 0, length))
    torch.testing.assert_close(y, right, **EXACT)
    assert aux == {}
    weight = torch.randn_like(y)
    wanted = (x, mixer.qkv.weight, mixer.out.weight, *([] if kernel is None else [mixer.conv]))
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_rows_of_few_and_many_tokens_stand_in_one_batch():
    mixer = Nystromformer(8, heads=2, landmarks=4, kernel=3).double()
    x, index = torch.randn(2, 9, 8).double(), torch.arange(9).repeat(2, 1)
    index[1, 3:] = -1
    with torch.no_grad():
        y = mixer.encode(x, Positions(index))[0]
        torch.testing.assert_close(y[0], reference(mixer, x[0]), **EXACT)
        torch.testing.assert_close(y[1, :3], reference(mixer, x[1, :3]), **EXACT)


def test_with_as_many_landmarks_as_tokens_it_is_softmax_attention():
    mixer = Nystromformer(8, heads=4, kv_heads=1, landmarks=9, kernel=None).double()
    full = Softmax(8, heads=4, kv_heads=1, pattern=Full()).double()
    full.load_state_dict(mixer.state_dict())
    x, pos = torch.randn(2, 9, 8).double(), Positions.range(2, 0, 9)
    with torch.no_grad():
        torch.testing.assert_close(mixer.encode(x, pos)[0], full.encode(x, pos)[0], **EXACT)


def test_more_steps_bring_the_inverse_nearer_and_six_are_not_always_enough():
    a = (3 * torch.randn(1, 1, 6, 6).double()).softmax(-1)
    errors = [float((a @ pseudo_inverse(a, n) - torch.eye(6)).abs().max()) for n in (3, 6, 12, 24)]
    assert errors[0] > errors[1] > 1e-6 > errors[2]
    assert errors[3] < 1e-12


@pytest.mark.parametrize(("landmarks", "heads"), [(4, 2), (12, 2), (3, 4)])
def test_transformers_gives_the_same_for_a_row_alone_with_copied_weights(landmarks, heads):
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    from transformers import NystromformerConfig

    config = NystromformerConfig(
        hidden_size=8, num_attention_heads=heads, num_landmarks=landmarks, segment_means_seq_len=12,
        conv_kernel_size=3, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    theirs = modeling.NystromformerSelfAttention(config).double().eval()
    mixer = Nystromformer(8, heads=heads, bias="all", landmarks=landmarks, kernel=3, coupled=True).double()
    alone = Nystromformer(8, heads=heads, bias="all", landmarks=landmarks, kernel=3).double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(getattr(theirs, part), name) for part in ("query", "key", "value")]
            getattr(mixer.qkv, name).copy_(torch.cat(parts))
        mixer.conv.copy_(theirs.conv.weight[:, 0, :, 0])
        mixer.out.weight.copy_(torch.eye(8))
        mixer.out.bias.zero_()
        mixer.qkv.weight.mul_(4)
        for part, weight in zip(("query", "key", "value"), mixer.qkv.weight.split(8), strict=True):
            getattr(theirs, part).weight.copy_(weight)
        alone.load_state_dict(mixer.state_dict())
        x, pos = torch.randn(3, 12, 8).double(), Positions.range(3, 0, 12)
        ours = mixer.encode(x, pos)[0]
        rows = torch.cat([theirs(row[None])[0] for row in x])
        torch.testing.assert_close(ours, rows, **EXACT)
        # theirs depends on the other rows of a batch, and the paper's norm is each matrix's own
        if landmarks < 12:
            assert float((theirs(x)[0] - rows).abs().max()) > 1e-7
            assert float((alone.encode(x, pos)[0] - rows).abs().max()) > 1e-7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nystromformer(8, landmarks=0), "landmarks=0 and iterations=6 must both be at least 1"),
        (lambda: Nystromformer(8, kernel=4), "kernel=4 must be odd; nearest is 5"),
        (lambda: Nystromformer(8, bias="some"), "unknown bias 'some'"),
        (
            lambda: Nystromformer(8).encode(torch.randn(1, 3, 8), Positions.range(1, 0, 2)),
            r"x must have shape \(B=1, T=2, X=8\); got \(1, 3, 8\)",
        ),
    ],
)
def test_what_the_mixer_refuses_it_says(make, message):
    with pytest.raises(ValueError, match=message):
        make()
