"""Clustered attention: as many clusters as tokens are exact attention; fewer are the paper's equations."""

import pytest
import torch

from writehead.core.positions import Positions
from writehead.core.work import Call
from writehead.laws import check
from writehead.mixers.clustered import Clustered
from writehead.mixers.softmax import Softmax
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary


def make(**options) -> Clustered:
    return Clustered(16, **{"heads": 4, "clusters": 3, "top_k": 4, **options}).double()


def row(length=12) -> tuple[torch.Tensor, Positions]:
    return torch.randn(1, length, 16, dtype=torch.float64), Positions.range(1, 0, length)


@pytest.mark.parametrize("law", ["encode rows", "encode padding"])
def test_one_write_head_obeys(law):
    verdict = check(Clustered(16, heads=4, kv_heads=1, clusters=3, top_k=4), law, length=13)
    assert verdict.passed, verdict


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_cluster_for_each_token_is_softmax_attention(top_k, kv_heads):
    position = Rotary(4)
    mixer = make(clusters=12, top_k=top_k, kv_heads=kv_heads, position=position)
    exact = Softmax(16, heads=4, kv_heads=kv_heads, pattern={"name": "full"}, position=position).double()
    exact.load_state_dict({n: t for n, t in mixer.state_dict().items() if n != "planes"})
    x, pos = row()
    assert torch.allclose(mixer.encode(x, pos)[0], exact.encode(x, pos)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [0, 4])
def test_values_and_gradients_are_the_papers_equations(top_k):
    mixer = make(top_k=top_k)
    x, pos = row()
    x.requires_grad_()
    y, _ = mixer.encode(x, pos)
    q, k, v = ((x[0] @ w.T).view(12, 4, 4).transpose(0, 1) for w in mixer.qkv.weight.chunk(3))
    cluster = mixer._cluster(q[None].detach(), pos.index)[0]
    assert len(cluster.unique()) > 1
    heads = []
    for h in range(4):
        rows = []
        for i in range(12):
            mates = [j for j in range(12) if cluster[h, j] == cluster[h, i]]
            shared = torch.softmax(k[h] @ q[h, mates].mean(0) / 2, 0)
            best = shared.topk(top_k).indices.tolist()
            weights = [None if s in best else shared[s] for s in range(12)]
            own = torch.softmax(torch.stack([q[h, i] @ k[h, s] for s in best]) / 2, 0) if best else ()
            for share, s in zip(own, best, strict=True):
                weights[s] = shared[best].sum() * share
            rows.append(torch.stack(weights) @ v[h])
        heads.append(torch.stack(rows))
    right = mixer.out(torch.cat(heads, 1))
    assert torch.allclose(y[0], right, rtol=1e-10, atol=1e-12)
    by, wanted = torch.randn_like(right), [x, mixer.qkv.weight]
    for a, b in zip(*(torch.autograd.grad((t * by).sum(), wanted) for t in (y[0], right)), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_queries_of_two_directions_make_two_clusters():
    mixer = make(clusters=2)
    q = torch.where(torch.arange(10)[:, None] % 3 == 0, 1.0, -1.0) * torch.tensor([3.0, 1.0, 2.0, 5.0])
    cluster = mixer._cluster(q.double().expand(1, 4, 10, 4), torch.arange(10)[None])
    for head in cluster[0]:
        assert torch.equal(head == head[0], torch.arange(10) % 3 == 0)


def test_work_grows_with_the_length_and_not_its_square():
    mixer = make()
    small, large = (mixer.work(Call(tokens=n)).flops for n in (1000, 10_000))
    assert large == 10 * small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters=0, bits=63 and iterations=10 must be at least 1, top_k=4 at least 0"),
        ({"top_k": -1}, "top_k=-1 at least 0"),
        ({"position": ALiBi(4)}, "clustered attention adds no bias to scores; use rotary"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
