"""Cluster-Former: the paper's windows, one cluster as a sliding window, k-means of remembered states."""

import pytest
import torch
from reference.cluster_former import clustered

from writehead.core.positions import Positions
from writehead.core.replay import Tape
from writehead.core.work import Call
from writehead.laws import check
from writehead.mixers.cluster_former import MEMORY, ClusterFormer
from writehead.mixers.softmax import Softmax
from writehead.positions.alibi import ALiBi


def make(**options) -> ClusterFormer:
    return ClusterFormer(16, **{"heads": 4, "clusters": 3, "window": 6, "stride": 4, **options})


def row(length=13) -> tuple[torch.Tensor, Positions]:
    return torch.randn(1, length, 16, dtype=torch.float64), Positions.range(1, 0, length)


@pytest.mark.parametrize("law", ["encode padding"])
@pytest.mark.parametrize("options", [{}, {"question": 2}, {"kv_heads": 1, "stride": 1}])
def test_every_kind_obeys(options, law):
    verdict = check(make(**options), law, length=13)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 13),
        ({"question": 2}, 13),
        ({"kv_heads": 2}, 14),
        ({"stride": 6}, 12),
        ({}, 3),
        ({"stride": 1}, 7),
    ],
)
def test_values_and_gradients_are_the_papers_equations(options, length):
    mixer = make(**options).double().eval()
    x, pos = row(length)
    x.requires_grad_()
    y, _ = mixer.encode(x, pos)
    sizes = [16, 4 * mixer.kv_heads, 4 * mixer.kv_heads]
    heads = [part.view(-1, 4, 16) for part in mixer.qkv.weight.split(sizes)]
    right = clustered(x[0], *heads, mixer.out.weight, mixer.means, 6, mixer.stride, mixer.question)
    assert torch.allclose(y[0], right, rtol=1e-10, atol=1e-12)
    by, wanted = torch.randn_like(right), [x, mixer.qkv.weight]
    for a, b in zip(*(torch.autograd.grad((t * by).sum(), wanted) for t in (y[0], right)), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_one_cluster_in_one_window_is_softmax_attention():
    mixer = make(clusters=1, window=20).double().eval()
    exact = Softmax(16, heads=4, pattern={"name": "full"}).double()
    exact.load_state_dict({n: t for n, t in mixer.state_dict().items() if n.startswith(("qkv", "out"))})
    x, pos = row()
    assert torch.allclose(mixer.encode(x, pos)[0], exact.encode(x, pos)[0], rtol=1e-10, atol=1e-12)


def test_one_cluster_and_windows_side_by_side_are_blocks():
    mixer = make(clusters=1, window=4, stride=4).double().eval()
    exact = Softmax(16, heads=4, pattern={"name": "block", "size": 4}).double()
    exact.load_state_dict({n: t for n, t in mixer.state_dict().items() if n.startswith(("qkv", "out"))})
    x, pos = row()
    assert torch.allclose(mixer.encode(x, pos)[0], exact.encode(x, pos)[0], rtol=1e-10, atol=1e-12)


def test_training_remembers_states_and_finds_their_means():
    torch.manual_seed(0)
    mixer = make(clusters=2, refit=3)
    ends = torch.randn(2, 16)
    x = ends[torch.arange(12) % 2].view(1, 12, 16)
    pos = Positions(torch.cat([torch.arange(10), torch.full((2,), -1)])[None])
    before = mixer.means.clone()
    mixer.eval().encode(x, pos)
    assert torch.equal(mixer.means, before)
    mixer.train().encode(x, pos)
    assert torch.equal(mixer.memory[:10], x[0, :10])
    assert not mixer.memory[10:].any()
    found = mixer.means[(ends @ mixer.means.T).argmax(-1)]
    assert torch.allclose(found, ends, atol=1e-6)
    after = mixer.means.clone()
    for _ in range(2):
        mixer.encode(2 * x, pos)
    assert torch.equal(mixer.means, after)
    mixer.encode(2 * x, pos)  # the third call since
    assert not torch.equal(mixer.means, after)


def test_the_memory_keeps_the_newest_states_in_sixteen_bits_too():
    mixer = make(refit=10**6).bfloat16()
    values = torch.arange(MEMORY + 300).bfloat16()[:, None].expand(-1, 16)
    for part in values.split(1000):
        mixer._remember(part)
    assert torch.equal(mixer.memory[:300], values[MEMORY:])
    assert torch.equal(mixer.memory[300:], values[300:MEMORY])


def test_a_second_computation_remembers_nothing_and_keeps_its_windows():
    mixer, x, pos, tape = make(), torch.randn(2, 9, 16), Positions.range(2, 0, 9), Tape()
    with tape.record():
        y, _ = mixer.encode(x, pos)
    kept = mixer.seen.clone()
    mixer.means.normal_()
    with tape.replay():
        z, _ = mixer.encode(x, pos)
    assert torch.equal(mixer.seen, kept)
    assert torch.equal(y, z)


def test_work_grows_with_the_length_and_not_its_square():
    small, large = (make().work(Call(tokens=n)).flops for n in (1000, 10_000))
    assert large == 10 * small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters=0, window=6 and refit=1000 must be at least 1, question=0 at least 0"),
        ({"stride": 7}, "stride=7 must be from 1 to window=6, or tokens are left out"),
        ({"refit": 1 << 21}, "refit=2097152 must be below 2097152"),
        ({"position": ALiBi(4)}, "Cluster-Former adds no bias to scores; use rotary"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
