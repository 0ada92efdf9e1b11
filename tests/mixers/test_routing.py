"""Routing attention: the equations, online k-means, the paper's clusters against routing-transformer."""

import pytest
import torch
from reference.routing import picked, routed
from torch.nn import functional as F

from writehead.core.positions import Positions
from writehead.core.replay import Tape
from writehead.core.slots import Store
from writehead.core.state import nbytes
from writehead.core.work import Call
from writehead.feedforward.dense import Dense
from writehead.laws import check
from writehead.mixers.routing import COMMIT, Routing
from writehead.ops import centroids as ops
from writehead.ops.centroids import Centroids, norm
from writehead.ops.heaps import empty, take
from writehead.ops.top_clusters import best, within
from writehead.positions.rope import Rotary
from writehead.stacks.reversible import Reversible


def make(**options) -> Routing:
    return Routing(16, **{"heads": 4, "clusters": 3, "window": 4, "local_window": 5, **options})


@pytest.mark.parametrize("law", ["split", "causal", "padding", "select"])
@pytest.mark.parametrize(
    "options",
    [{}, {"kv_heads": 1, "position": Rotary(4)}, {"mode": "running", "window": 2}],
    ids=["shared", "one write-head", "running"],
)
def test_few_clusters_obey(options, law):
    verdict = check(make(**options), law, length=13)
    assert verdict.passed, verdict


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_routed_heads_are_the_papers_equations(kv_heads):
    mixer = make(kv_heads=kv_heads).double().eval()
    x = torch.randn(17, 16, dtype=torch.float64, requires_grad=True)
    y, _, _ = mixer(x[None], Positions.range(1, 0, 17))
    local, _, _ = mixer.local(x[None], Positions.range(1, 0, 17))
    if kv_heads is None:
        weights, parts = [mixer.qk.weight, mixer.v.weight], (mixer.qk.weight,) * 2 + (mixer.v.weight,)
    else:
        weights, parts = [mixer.qkv.weight], mixer.qkv.weight.split([8, 4, 4])
    heads = [part.view(-1, 4, 16) for part in parts]
    right = routed(x, *heads, mixer.out.weight, mixer.centroids.means, 4)
    assert torch.allclose((y - local)[0], right, rtol=1e-11, atol=1e-11)
    by = torch.randn_like(right)
    for a, b in zip(
        *(torch.autograd.grad((t * by).sum(), [x, *weights]) for t in ((y - local)[0], right)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_running_clusters_are_the_papers_picked_from_every_prefix():
    mixer = make(mode="running").double().eval()
    paper = make(mode="paper").double().eval()
    paper.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        y, state, _ = mixer(x, Positions.range(2, 0, 30))
        for t in range(30):
            z, _, _ = paper(x[:, : t + 1], Positions.range(2, 0, t + 1))
            assert torch.allclose(z[:, -1], y[:, t], rtol=1e-12, atol=1e-12)
        whole, _, _ = paper(x, Positions.range(2, 0, 30))
    assert not torch.allclose(whole, y, atol=1e-3)  # what the paper trains is not what it decodes
    assert nbytes(state) == mixer.state_bytes(2, 30, 8)


def test_running_clusters_are_the_authors_decoder_token_by_token():
    mixer = make(mode="running").double().eval()
    x = torch.randn(19, 16, dtype=torch.float64, requires_grad=True)
    y, _, _ = mixer(x[None], Positions.range(1, 0, 19))
    local, _, _ = mixer.local(x[None], Positions.range(1, 0, 19))
    weights = [mixer.qk.weight, mixer.v.weight]
    heads = [part.view(-1, 4, 16) for part in weights]
    right = picked(x, *heads, mixer.out.weight, mixer.centroids.means, 4)
    assert torch.allclose((y - local)[0], right, rtol=1e-11, atol=1e-11)
    by = torch.randn_like(right)
    for a, b in zip(
        *(torch.autograd.grad((t * by).sum(), [x, *weights]) for t in ((y - local)[0], right)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_of_equal_tokens_the_older_ones_stay():
    q = k = v = torch.eye(5, dtype=torch.float64).view(1, 5, 1, 5)
    score = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0], dtype=torch.float64).view(1, 5, 1, 1)
    y, after = take(q, k, v, score, empty(1, 1, 1, 2, 5, Store(), q), scale=0.0, spare=0.0)
    found = torch.nan_to_num(y[0, :, 0])
    right = torch.zeros(5, 5, dtype=torch.float64)
    right[0, 0], right[1, :2], right[3, [1, 3]] = 1, 0.5, 0.5
    assert torch.equal(found, right)
    assert torch.equal(after.v[0, 0, 0], v[0, [1, 3], 0])
    assert after.score.flatten().tolist() == [2.0, 2.0]


def test_centroids_move_to_their_members_and_padding_moves_none(monkeypatch):
    torch.manual_seed(1)
    centroids = Centroids(1, 2, 4).double()
    ends = norm(torch.tensor([[3.0, -1, -1, -1], [-1, 3.0, -1, -1]], dtype=torch.float64))
    x = ends[torch.randint(2, (200,))].view(1, 200, 1, 4)
    valid = torch.ones(1, 200, dtype=torch.bool)
    cluster = centroids.nearest(x, centroids.means)
    assert torch.equal(cluster, (x @ centroids.means[0].T).argmax(-1).to(torch.int16))
    own = torch.stack([x[cluster == c].sum(0) for c in (0, 1)])[None]
    counts = torch.stack([(cluster == c).sum() for c in (0, 1)])[None].double()
    sums = 0.999 * centroids.sums + 0.001 * own
    seen = 0.999 + 0.001 * counts
    smooth = (seen + 1e-5) / (seen.sum() + 2e-5) * seen.sum()
    centroids.move(x, cluster, valid)
    assert torch.allclose(centroids.means, sums / smooth[..., None], rtol=1e-12)
    before = centroids.means.clone()
    centroids.move(torch.full_like(x, torch.nan), cluster, ~valid)
    assert torch.allclose(centroids.means, before, rtol=1e-12)
    monkeypatch.setattr(ops, "DECAY", 0.9)
    for _ in range(80):
        centroids.move(x, centroids.nearest(x, centroids.means), valid)
    found = centroids.means[0][centroids.nearest(ends.view(1, 2, 1, 4), centroids.means).long()[0, :, 0]]
    assert torch.allclose(found, ends, atol=1e-2)


def test_training_moves_centroids_and_gives_the_loss_and_evaluation_does_neither():
    mixer, x, pos = make(), torch.randn(2, 9, 16), Positions.range(2, 0, 9)
    before = mixer.centroids.means.clone()
    _, _, aux = mixer.eval()(x, pos)
    assert aux == {}
    assert torch.equal(mixer.centroids.means, before)
    _, _, aux = mixer.train()(x, pos)
    q = norm(mixer.qk(x).view(2, 9, 2, 4))
    nearest = torch.stack([before[h][(q[:, :, h] @ before[h].T).argmax(-1)] for h in (0, 1)], 2)
    assert torch.allclose(aux["routing_loss"], COMMIT * (q - nearest).square().mean(), rtol=1e-5)
    assert not torch.equal(mixer.centroids.means, before)


def test_a_second_computation_neither_moves_centroids_nor_sees_them_moved():
    mixer, x, pos, tape = make(), torch.randn(2, 9, 16), Positions.range(2, 0, 9), Tape()
    with tape.record():
        y, _, aux = mixer(x, pos)
    moved = mixer.centroids.means.clone()
    with tape.replay():
        z, _, again = mixer(x, pos)
    assert torch.equal(mixer.centroids.means, moved)
    assert torch.equal(y, z)
    assert torch.equal(aux["routing_loss"], again["routing_loss"])


@pytest.mark.parametrize("mode", ["nearest", "running", "paper"])
def test_a_reversible_stack_moves_each_centroid_once(mode):
    torch.manual_seed(0)
    stack = Reversible(16, [(make(mode=mode), Dense(16, hidden=8), None)])
    x, pos = torch.randn(2, 20, 16), Positions.range(2, 0, 20)
    y, aux = stack.whole(x, pos, ((None, None),))
    means = stack.blocks[0].mixer.centroids.means.clone()
    (y.square().sum() + aux["routing_loss"]).backward()
    assert torch.equal(stack.blocks[0].mixer.centroids.means, means)


@pytest.mark.parametrize("mode", ["nearest", "running", "paper"])
def test_whole_is_forward_without_a_state(mode):
    mixer, x, pos = make(mode=mode).eval(), torch.randn(2, 12, 16), Positions.range(2, 0, 12)
    assert torch.equal(mixer.whole(x, pos)[0], mixer(x, pos)[0])


def test_the_state_is_constant():
    mixer, x = make().eval(), torch.randn(1, 90, 16)
    state, sizes = mixer.init_state(1, x), set()
    for t in range(0, 90, 30):
        _, state, _ = mixer(x[:, t : t + 30], Positions.range(1, t, t + 30), state)
        sizes.add(nbytes(state))
    assert sizes == {mixer.state_bytes(1, 90, 4)}


def test_the_papers_clusters_are_those_of_routing_transformer():
    theirs = pytest.importorskip(
        "routing_transformer.routing_transformer", reason="oracle: routing-transformer"
    )
    H, N, W, D = 2, 3, 5, 8
    attention = theirs.KmeansAttention(N, W, H, D, causal=True, shared_qk=True).double().eval()
    q, v = (torch.randn(2, 14, H, D, dtype=torch.float64) for _ in range(2))
    right, _ = attention(*(t.transpose(1, 2) for t in (q, q, v)))
    # theirs: unit keys and plain queries, scaled; no token reads itself unless alone; 1e-5 beside the count
    pos = torch.arange(14).repeat(2, 1)
    score = torch.einsum("bthd,hnd->bthn", F.normalize(q, dim=-1), attention.kmeans.means)
    members = best(score, pos, W)
    ours = within(q, F.normalize(q, dim=-1), v, members, pos, scale=D**-0.5, own=False, spare=1e-5)
    assert torch.allclose(ours, right.transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_a_token_in_no_cluster_gives_nothing_and_one_in_two_their_mean():
    q = k = v = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    pos = torch.tensor([[0, 1, 2, -1]])
    members = torch.tensor([[[[0, 1], [1, 3]]]])
    y = within(q, k, v, members, pos, scale=1.0, spare=0.0)
    assert torch.equal(y[0, 0], v[0, 0])
    assert not y[0, 2].isfinite().all()  # 0 / 0, which the default spare makes 0
    weights = torch.softmax(torch.stack([q[0, 1, 0] @ k[0, 0, 0], q[0, 1, 0] @ k[0, 1, 0]]), 0)
    assert torch.allclose(y[0, 1, 0], (weights @ v[0, :2, 0] + v[0, 1, 0]) / 2)
    assert torch.equal(within(q, k, v, members, pos, scale=1.0)[0, 2], torch.zeros(1, 2))


def test_padding_is_in_no_cluster_of_the_papers_form():
    mixer, x = make(mode="paper", window=3).double().eval(), torch.randn(1, 12, 16, dtype=torch.float64)
    index = torch.cat([torch.arange(8), torch.full((4,), -1)])[None]
    y, state, _ = mixer(x, Positions(index))
    x[:, 8:] = 1e6
    z, _, _ = mixer(x, Positions(index))
    assert state is None
    assert torch.equal(y[:, :8], z[:, :8])


def test_the_papers_form_reads_no_later_token_but_depends_on_them():
    mixer, x = make(mode="paper", clusters=4).double().eval(), torch.randn(1, 40, 16, dtype=torch.float64)
    y, _, _ = mixer(x, Positions.range(1, 0, 40))
    z, _, _ = mixer(x[:, :30], Positions.range(1, 0, 30))
    assert int(((y[:, :30] - z).abs() > 1e-6).any(-1).sum()) > 3
    with pytest.raises(
        ValueError, match=r'mode="paper" cannot decode: .*mode="running" and "nearest" decode with'
    ):
        mixer.init_state(1, x)


def test_work_of_one_token_does_not_grow_with_the_context():
    mixer = make()
    assert mixer.work(Call(context=10**6)) == mixer.work(Call(context=10**4))
    assert mixer.work(Call(context=2)).state_read < mixer.work(Call(context=100)).state_read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "top"}, "unknown mode 'top'.*accepted: nearest, paper"),
        ({"local_heads": 4}, "local_heads=4 must be from 1 to 3: both kinds are needed"),
        ({"clusters": 0}, "clusters=0 must be from 1 to 32768, window=4 at least 1"),
        ({"heads": 3}, "dim=16 must be a positive multiple of heads=3"),
        (
            {"mode": "paper", "kv_heads": 1},
            'mode="paper" has shared queries and keys: leave kv_heads out; got 1',
        ),
        (
            {"mode": "running", "kv_heads": 1},
            'mode="running" has shared queries and keys: leave kv_heads out; got 1',
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
