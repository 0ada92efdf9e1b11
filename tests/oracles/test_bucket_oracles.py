"""reformer-pytorch beside the paper's chunks: one round is the same; it draws other hashes at every call."""

import pytest
import torch
from torch.nn import functional as F

from writehead.ops.look_back import look_back

theirs = pytest.importorskip("reformer_pytorch", reason="oracle: reformer-pytorch")
T, D, CHUNK = 32, 8, 4


def drawn() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(2, 3, T, D, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("causal", [True, False])
def test_one_round_is_that_of_reformer_pytorch(causal):
    qk, v = drawn()
    attention = theirs.LSHAttention(bucket_size=CHUNK, n_hashes=1, causal=causal, dropout=0.0).double().eval()
    right, _, bucket = attention(qk, v)
    bucket = bucket.view(3, T, 1, 1)
    # theirs: keys of length one, scores scaled; a token that finds nothing else reads itself
    q, k = qk * D**-0.5, F.normalize(qk, dim=-1)
    pos = torch.arange(T).expand(3, -1)
    y, lse = look_back(
        *(t[:, :, None] for t in (q, k, v)),
        bucket,
        pos,
        buckets=int(bucket.max()) + 1,
        chunk=CHUNK,
        causal=causal,
    )
    y = torch.where((lse == -torch.inf)[..., None], v[:, :, None], y)[:, :, 0]
    assert float((y - right).abs().max()) < 1e-6


def test_two_calls_of_reformer_pytorch_differ_though_in_evaluation():
    qk, v = drawn()
    attention = theirs.LSHAttention(bucket_size=CHUNK, n_hashes=2, causal=True, dropout=0.0).double().eval()
    torch.manual_seed(0)
    first, second = (attention(qk, v)[0] for _ in range(2))
    assert float((first - second).abs().max()) > 1e-2
