"""Sinkhorn attention: the equations, balancing, the encoder's forms, where it ends."""

import pytest
import torch
from reference.sinkhorn import attention, weights

from writehead.core.positions import Positions
from writehead.core.work import Call
from writehead.laws import check
from writehead.mixers.sinkhorn import Sinkhorn
from writehead.ops.sinkhorn import LOW, balance, next_row
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary


def make(**options) -> Sinkhorn:
    return Sinkhorn(16, **{"heads": 4, "window": 4, "blocks": 12, **options})


@pytest.mark.slow
@pytest.mark.parametrize("law", ["split", "causal", "padding", "encode rows", "encode padding"])
def test_several_blocks_obey(law):
    verdict = check(make(kv_heads=2, position=Rotary(4)), law, length=13)
    assert verdict.passed, verdict


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_causal_attention_is_the_equations(kv_heads):
    mixer = make(kv_heads=kv_heads, iterations=3).double().eval()
    x = torch.randn(14, 16, dtype=torch.float64, requires_grad=True)
    y, _, _ = mixer(x[None], Positions.range(1, 0, 14))
    q, k, v = mixer.qkv.weight.split([16, 4 * kv_heads, 4 * kv_heads])

    def sort(summary):
        return mixer.outer(torch.relu(mixer.inner(summary))).view(kv_heads, 12) / 0.75

    heads = [part.view(-1, 4, 16) for part in (q, k, v)]
    right = attention(x, *heads, mixer.out.weight, sort, window=4, iterations=3)
    assert torch.allclose(y[0], right, rtol=1e-11, atol=1e-11)
    by, wanted = torch.randn_like(right), [x, mixer.qkv.weight, mixer.inner.weight, mixer.outer.weight]
    for a, b in zip(*(torch.autograd.grad((t * by).sum(), wanted) for t in (y[0], right)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_rows_one_after_the_other_are_the_matrix_and_sum_to_one():
    scores = torch.randn(6, 6, dtype=torch.float64) * 2
    columns, rows = torch.full((1, 4, 1, 6), LOW, dtype=torch.float64), []
    for n in range(6):
        row, columns = next_row(scores[None, n : n + 1], columns, n)
        rows.append(row[0, 0])
    assert torch.allclose(torch.stack(rows), weights(scores, 4), rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.stack(rows).sum(1), torch.tensor([0.0, 1, 1, 1, 1, 1]).double())
    assert torch.equal(rows[0], torch.zeros(6).double())


def test_many_iterations_balance_rows_and_columns():
    scores = torch.randn(2, 6, 6, dtype=torch.float64)
    P = balance(scores, torch.ones(6, 6, dtype=torch.bool), 200)
    for dim in (1, 2):
        assert torch.allclose(P.sum(dim), torch.ones(2, 6).double(), atol=1e-9)
    some = torch.ones(6, 6, dtype=torch.bool)
    some[:, 4:], some[4:] = False, False
    part = balance(scores, some, 50)
    assert torch.allclose(part[:, :4, :4], balance(scores[:, :4, :4], some[:4, :4], 50))
    assert part[:, 4:].abs().max() == part[:, :, 4:].abs().max() == 0


def test_balancing_is_that_of_sinkhorn_transformer_but_for_the_last_rows():
    theirs = pytest.importorskip(
        "sinkhorn_transformer.sinkhorn_transformer", reason="oracle: sinkhorn-transformer"
    )
    scores = torch.randn(3, 5, 5, dtype=torch.float64)
    for n in (1, 4):
        right = theirs.sinkhorn_sorting_operator(scores, n)  # ends on columns
        right = right / right.sum(-1, keepdim=True)
        assert torch.allclose(balance(scores, torch.ones(5, 5, dtype=torch.bool), n), right, rtol=1e-12)


def test_an_encoder_reads_the_own_and_the_sorted_block():
    mixer = make(heads=1, window=3).double().eval()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, v = ((x @ w.T)[0] for w in mixer.qkv.weight.chunk(3))
    blocks = x[0].view(3, 3, 16)
    scores = mixer.outer(torch.relu(mixer.inner(blocks.sum(1))))[:, :3] / 0.75
    P = balance(scores, torch.ones(3, 3, dtype=torch.bool), 5)
    mixed_k, mixed_v = (torch.einsum("nm,mwd->nwd", P, t.view(3, 3, 16)) for t in (k, v))
    right = []
    for t in range(9):
        n = t // 3
        keys, vals = (torch.cat([m[n], o.view(3, 3, 16)[n]]) for m, o in ((mixed_k, k), (mixed_v, v)))
        right.append(torch.softmax(keys @ q[t] / 4, 0) @ vals)
    y, _ = mixer.encode(x, Positions.range(1, 0, 9))
    assert torch.allclose(y[0], mixer.out(torch.stack(right)), rtol=1e-11, atol=1e-12)
    cut = make(heads=1, window=3, sortcut=2).double().eval()
    cut.load_state_dict(mixer.state_dict())
    y, _ = cut.encode(x, Positions.range(1, 0, 9))
    read = torch.softmax(q @ mixed_k[:2].flatten(0, 1).T / 4, 1) @ mixed_v[:2].flatten(0, 1)
    assert torch.allclose(y[0], mixer.out(read), rtol=1e-11, atol=1e-12)


def test_noise_sorts_in_training_and_not_in_evaluation():
    mixer, x, pos = make(), torch.randn(1, 20, 16), Positions.range(1, 0, 20)
    assert not torch.allclose(mixer(x, pos)[0], mixer(x, pos)[0])
    mixer.eval()
    assert torch.equal(mixer(x, pos)[0], mixer(x, pos)[0])


def test_a_token_costs_less_than_with_all_keys():
    mixer = make(window=32, blocks=4096)
    work = mixer.work(Call(context=100_000))
    assert work.state_read < 100_000 * 2 * 16 * 4 / 20
    assert work.flops > mixer.work(Call(context=10)).flops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0, blocks=12 and iterations=5 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"sortcut": 13}, "sortcut=13 must be from 1 to blocks=12"),
        ({"position": ALiBi(4)}, "Sinkhorn attention adds no bias to scores, its mixed keys stand nowhere"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_sequences_longer_than_the_network_has_outputs_for_are_refused():
    mixer, x = make(), torch.randn(1, 49, 16)
    with pytest.raises(
        ValueError, match="position 48 does not exist: blocks=12 of window=4 tokens end at 47"
    ):
        mixer(x, Positions.range(1, 0, 49))
    with pytest.raises(ValueError, match="sortcut serves encoders"):
        make(sortcut=2)(x[:, :9], Positions.range(1, 0, 9))
