"""The recurrence beside other authors' code, where it is installed: flash-linear-attention's plain PyTorch
forms (fla-core; its package needs triton, these files do not) and performer-pytorch."""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from writehead.core.positions import Positions
from writehead.mixers.performer import Performer
from writehead.ops.scan import empty, scan, whole
from writehead.ops.scan_chunks import Rule

SUM, ONE = Rule(1e-10, floor=False), Rule(1.0, floor=True)


def fla(path):
    pytest.importorskip("einops")
    try:
        file = distribution("fla-core").locate_file(f"fla/ops/{path}/naive.py")
    except PackageNotFoundError:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_{path}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def theirs():
    return pytest.importorskip("performer_pytorch.performer_pytorch")


def draw(T, H=2, M=4, E=5):
    return torch.rand(2, T, H, M), torch.rand(2, T, H, M), torch.randn(2, T, H, E)


def test_linear_attention_is_flas_recurrent_and_chunked_form():
    naive = fla("linear_attn")
    q, k, v = draw(128)
    y, state = scan(q, k, v, empty(2, 2, 4, 5, v), SUM)
    right, (s, z) = naive.naive_recurrent_linear_attn(
        q, k, v, scale=1.0, normalize=True, output_final_state=True
    )
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.s[..., :-1], s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.s[..., -1], z[:, 0], rtol=1e-4, atol=1e-4)
    chunked = naive.naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True)
    torch.testing.assert_close(y, chunked, rtol=1e-4, atol=1e-5)


def test_the_gate_is_flas_simple_gated_form():
    naive = fla("simple_gla")
    q, k, v = draw(70)
    q = q / 100  # sums below 1, so that the floor gives the numerator
    gate = torch.randn(2, 70, 2)
    keep, add = torch.nn.functional.logsigmoid(gate), torch.nn.functional.logsigmoid(-gate)
    y, state = scan(q, k, v, empty(2, 2, 4, 5, v), ONE, decay=keep, gain=add)
    right, s = naive.naive_recurrent_simple_gla(q, k * add.exp()[..., None], v, keep, scale=1.0)
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.s[..., :-1], s, rtol=1e-4, atol=1e-5)


def test_features_are_performer_pytorchs_without_its_epsilon(theirs):
    mixer = Performer(16, heads=2, features=12)
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    W = mixer.features.directions[0]
    a, b, gain = mixer.features(torch.cat([q, k], 2))
    b = b * (gain - gain.amax(1, keepdim=True)).exp()[..., None]
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    c = theirs.softmax_kernel(rows[0], projection_matrix=W, is_query=True, eps=0.0)
    d = theirs.softmax_kernel(rows[1], projection_matrix=W, is_query=False, eps=0.0)
    right = theirs.linear_attention(c, d, rows[2]).transpose(1, 2)
    torch.testing.assert_close(whole(a, b, v, SUM), right, rtol=1e-4, atol=1e-5)


def test_rectified_features_are_performer_pytorchs(theirs):
    mixer = Performer(16, heads=2, features=12, kernel="relu")
    q, k, v = torch.randn(3, 1, 256, 2, 8).unbind()
    W = mixer.features.directions[0]
    a, b, _ = mixer.features(torch.cat([q, k], 2))
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    c, d = (theirs.generalized_kernel(t, projection_matrix=W, kernel_fn=torch.nn.ReLU()) for t in rows[:2])
    torch.testing.assert_close(
        torch.cat([a, b], 2), torch.cat([c, d], 1).transpose(1, 2), rtol=1e-5, atol=1e-6
    )
    right = theirs.causal_linear_attention_noncuda(c, d, rows[2]).transpose(1, 2)
    torch.testing.assert_close(scan(a, b, v, empty(1, 2, 12, 8, v), SUM)[0], right, rtol=1e-3, atol=1e-4)


def test_in_performer_pytorch_a_later_key_changes_earlier_outputs_and_in_ours_it_does_not(theirs):
    mixer = Performer(8, heads=1, features=16)
    x = torch.randn(1, 9, 8)
    huge = x.clone()
    huge[:, -1] *= 30
    W, found = mixer.features.directions[0], []
    with torch.no_grad():
        for rows in (x, huge):
            q, k, v = (t.transpose(1, 2) for t in (*mixer.qkv(rows)[0].split(1, 2), mixer.qkv(rows)[1]))
            c = theirs.softmax_kernel(q, projection_matrix=W, is_query=True)
            d = theirs.softmax_kernel(k, projection_matrix=W, is_query=False)
            found.append(theirs.causal_linear_attention_noncuda(c, d, v, chunk_size=9)[:, :, :-1])
        ours = [mixer(rows, Positions.range(1, 0, 9))[0][:, :-1] for rows in (x, huge)]
    assert float((found[0] - found[1]).abs().max()) > 1e-2
    assert torch.equal(*ours)
