"""routing-transformer and sinkhorn-transformer beside ours: what agrees, and what is wrong there."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from writehead.core.positions import Positions
from writehead.mixers.routing import COMMIT, Routing
from writehead.mixers.sinkhorn import Sinkhorn
from writehead.ops.centroids import Centroids
from writehead.ops.sinkhorn import balance

B, T, H, D, W = 2, 12, 2, 8, 3
N = T // W


@pytest.fixture(scope="module")
def sinkhorn():
    return pytest.importorskip(
        "sinkhorn_transformer.sinkhorn_transformer", reason="oracle: sinkhorn-transformer"
    )


@pytest.fixture(scope="module")
def routing():
    return pytest.importorskip(
        "routing_transformer.routing_transformer", reason="oracle: routing-transformer"
    )


class Given(nn.Module):
    """A sorting network of theirs that sorts as it is told."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, q: Tensor, k: Tensor, topk: int = 1) -> Tensor:
        return self.matrix


def both(sinkhorn, shared: bool, sortcut: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Theirs with our weights and our balanced matrix, ours, and ours written out; shared: values are the keys."""
    torch.manual_seed(0)
    mixer = Sinkhorn(H * D, heads=H, window=W, blocks=N, sortcut=sortcut).double().eval()
    x = torch.randn(B, T, H * D, dtype=torch.float64)
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(H * D))
        if shared:
            mixer.qkv.weight[2 * H * D :] = mixer.qkv.weight[H * D : 2 * H * D]
        q, k, v = (
            (x @ w.T).unflatten(-1, (H, D)).transpose(1, 2) for w in mixer.qkv.weight.chunk(3)
        )  # (B, H, T, D)
        scores = mixer._sort(x.unflatten(1, (N, W)).sum(2)).transpose(1, 2)  # (B, H, N, N)
        P = balance(scores, torch.ones(N, N, dtype=torch.bool), mixer.iterations)
        attention = sinkhorn.SinkhornAttention(
            T if sortcut else W, H * D, D, H, T, kv_bucket_size=W, n_sortcut=sortcut or 0
        ).double()
        attention.sort_net = Given(P.flatten(0, 1))
        right = attention(q, k, v).transpose(1, 2).flatten(2)
        ours, _ = mixer.encode(x, Positions.range(B, 0, T))
        sorted_k, sorted_v = (torch.einsum("bhnm,bhmwd->bhnwd", P, t.unflatten(2, (N, W))) for t in (k, v))
        rows = []
        for t in range(T):
            own = slice(t // W * W, t // W * W + W)
            if sortcut:
                keys, values = (s[:, :, :sortcut].flatten(2, 3) for s in (sorted_k, sorted_v))
            else:
                keys, values = (
                    torch.cat([s[:, :, t // W], o[:, :, own]], 2) for s, o in ((sorted_k, k), (sorted_v, v))
                )
            shares = torch.softmax(torch.einsum("bhd,bhsd->bhs", q[:, :, t], keys) * D**-0.5, -1)
            rows.append(torch.einsum("bhs,bhsd->bhd", shares, values).flatten(1))
    return right, ours, torch.stack(rows, 1)


def test_sinkhorn_attention_is_theirs_where_values_are_keys(sinkhorn):
    right, ours, _ = both(sinkhorn, shared=True)
    assert float((ours - right).abs().max()) < 1e-10


def test_sinkhorn_transformer_puts_keys_in_place_of_sorted_values(sinkhorn):
    wrong, ours, loops = both(sinkhorn, shared=False)
    assert float((ours - loops).abs().max()) < 1e-10
    assert float((wrong - loops).abs().max()) > 0.1


def test_sortcut_is_that_of_sinkhorn_transformer(sinkhorn):
    right, ours, loops = both(sinkhorn, shared=False, sortcut=2)
    assert float((ours - right).abs().max()) < 1e-10
    assert float((ours - loops).abs().max()) < 1e-10


def test_sinkhorn_transformer_draws_noise_in_evaluation_and_ours_does_not(sinkhorn):
    torch.manual_seed(0)
    attention = sinkhorn.SinkhornAttention(W, H * D, D, H, T, non_permutative=False).double().eval()
    q = torch.randn(B, H, T, D, dtype=torch.float64)
    first, second = (attention(q, q, q) for _ in range(2))
    assert float((first - second).abs().max()) > 1e-2
    mixer, x = Sinkhorn(H * D, heads=H, window=W, blocks=N).eval(), torch.randn(B, T, H * D)
    assert torch.equal(*(mixer.encode(x, Positions.range(B, 0, T))[0] for _ in range(2)))


def test_tokens_find_the_centroids_and_the_loss_of_routing_transformer(routing):
    kmeans = routing.Kmeans(H, D, 5).double()
    kmeans.initted.fill_(True)
    x = F.normalize(torch.randn(B, H, T, D, dtype=torch.float64), dim=-1)
    _, loss = kmeans(x)
    ours = Centroids(H, 5, D).double()
    nearest = ours.nearest(x.transpose(1, 2), kmeans.means).long()
    assert torch.equal(nearest, routing.dists_and_buckets(x, kmeans.means)[1].transpose(1, 2))
    away = x.transpose(1, 2) - kmeans.means[torch.arange(H), nearest]
    assert float((COMMIT * away.square().mean() - loss).abs()) < 1e-15


def test_members_depend_on_later_tokens_in_routing_transformer_and_not_in_ours(routing):
    torch.manual_seed(0)
    layer = routing.KmeansAttention(3, W, H, D, causal=True, shared_qk=True).double().eval()
    q, v = torch.randn(2, B, H, T, D, dtype=torch.float64)
    with torch.no_grad():
        layer(q, q, v)  # the first call places the centroids, in evaluation too
        whole, _ = layer(q, q, v)
        prefix, _ = layer(q[:, :, : T - 4], q[:, :, : T - 4], v[:, :, : T - 4])
    assert float((whole[:, :, : T - 4] - prefix).abs().max()) > 0.1
    for mode in ("nearest", "running"):
        mixer = Routing(H * D, heads=H, clusters=3, window=W, local_window=2, mode=mode).double().eval()
        x = torch.randn(B, T, H * D, dtype=torch.float64)
        with torch.no_grad():
            y, _ = mixer.whole(x, Positions.range(B, 0, T))
            z, _ = mixer.whole(x[:, : T - 4], Positions.range(B, 0, T - 4))
        assert float((y[:, : T - 4] - z).abs().max()) < 1e-12
