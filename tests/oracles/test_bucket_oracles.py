"""Reformers of others beside ours: one round and a multiset of rounds agree; where they are wrong, loops say so."""

import pytest
import torch
from reference.buckets import lsh
from torch.nn import functional as F

from writehead.core.positions import Positions
from writehead.mixers.reformer import LSH
from writehead.ops.look_back import look_back

T, D, CHUNK = 32, 8, 4


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("reformer_pytorch", reason="oracle: reformer-pytorch")


def drawn() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(2, 3, T, D, generator=generator, dtype=torch.float64))


def run(theirs, rounds: int, causal: bool = True, **options):
    """Theirs, and ours with its buckets: (B, T, D) twice, and the buckets of each round (B, T, R)."""
    qk, v = drawn()
    attention = theirs.LSHAttention(bucket_size=CHUNK, n_hashes=rounds, causal=causal, dropout=0.0, **options)
    torch.manual_seed(1)
    right, _, bucket = attention.double().eval()(qk, v)
    n = T // CHUNK
    bucket = (bucket.view(3, rounds, T) % n).transpose(1, 2)
    # theirs: keys of length one, scores scaled; a token that finds nothing else reads itself
    heads = (t[:, :, None] for t in (qk * D**-0.5, F.normalize(qk, dim=-1), v))
    pos = torch.arange(T).expand(3, -1)
    y, lse = look_back(*heads, bucket[:, :, None], pos, buckets=n, chunk=CHUNK, causal=causal)
    y = torch.where((lse == -torch.inf)[..., None], v[:, :, None], y)[:, :, 0]
    return right, y, bucket


def by_loops(bucket: torch.Tensor, once: bool) -> torch.Tensor:
    """The causal chunks of the paper token by token: rounds end to end on a circle, own chunk and the one before."""
    qk, v = drawn()
    keys, out = F.normalize(qk, dim=-1), torch.empty_like(v)
    for b in range(len(qk)):
        slots = [t for r in range(bucket.shape[2]) for t in sorted(range(T), key=lambda t: bucket[b, t, r])]
        for t in range(T):
            found = []
            for place in (place for place, token in enumerate(slots) if token == t):
                own = place // CHUNK * CHUNK
                found += [s for at in range(own - CHUNK, own + CHUNK) if (s := slots[at]) < t]
            found = (sorted(set(found)) if once else found) or [t]
            shares = torch.softmax(keys[b, found] @ qk[b, t] * D**-0.5, 0)
            out[b, t] = shares @ v[b, found]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_one_round_is_that_of_reformer_pytorch(theirs, causal):
    right, y, _ = run(theirs, 1, causal)
    assert float((y - right).abs().max()) < 1e-6


def test_a_multiset_of_rounds_is_that_of_reformer_pytorch_and_of_loops(theirs):
    right, y, bucket = run(theirs, 3)
    assert float((y - right).abs().max()) < 1e-6
    assert float((y - by_loops(bucket, once=False)).abs().max()) < 1e-12


def test_reformer_pytorch_counts_keys_of_several_rounds_wrongly(theirs):
    """`allow_duplicate_attention=False` should give the paper's set; pairs around the circle's end get +20.7."""
    wrong, _, bucket = run(theirs, 3, allow_duplicate_attention=False)
    right = by_loops(bucket, once=True)
    away = (wrong - right).abs().amax(-1)
    assert float(away.max()) > 0.1
    assert int((away < 1e-6).sum()) > T  # rows that meet no such pair are right


def test_two_calls_of_reformer_pytorch_differ_though_in_evaluation(theirs):
    qk, v = drawn()
    attention = theirs.LSHAttention(bucket_size=CHUNK, n_hashes=2, causal=True, dropout=0.0).double().eval()
    torch.manual_seed(0)
    first, second = (attention(qk, v)[0] for _ in range(2))
    assert float((first - second).abs().max()) > 1e-2


def copied(theirs) -> tuple[torch.nn.Module, LSH]:
    """A layer of theirs, and ours with its weights and hashes of its own."""
    torch.manual_seed(2)
    layer = (
        theirs.LSHSelfAttention(dim=16, heads=2, bucket_size=CHUNK, n_hashes=2, causal=True).double().eval()
    )
    ours = LSH(16, heads=2, buckets=8, rounds=2, window=CHUNK).double().eval()
    with torch.no_grad():
        ours.qk.weight.copy_(layer.toqk.weight)
        ours.v.weight.copy_(layer.tov.weight)
        ours.out.weight.copy_(layer.to_out.weight)
    return layer, ours


def test_reformer_pytorch_decodes_what_it_never_computed_and_ours_what_loops_give(theirs):
    """It decodes by running each prefix anew: with the very same hashes that is another function of the prefix."""
    layer, ours = copied(theirs)
    x = torch.randn(1, T, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(3)
        whole = layer(x)
        torch.manual_seed(3)
        prefix = layer(x[:, : T // 2])
    assert float((whole[:, : T // 2] - prefix).abs().max()) > 1e-2

    weights = (ours.qk.weight.view(2, D, 16), ours.v.weight.view(2, D, 16), ours.out.weight)
    right = lsh(x[0], *weights, ours.hashes.rotations, CHUNK, once=True)
    state, steps = ours.init_state(1, x), []
    with torch.no_grad():
        for t in range(T):
            y, state, _ = ours(x[:, t : t + 1], Positions.range(1, t, t + 1), state)
            steps.append(y[0, 0])
    assert torch.allclose(torch.stack(steps), right, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_transformers_reformer_decodes_a_second_row_with_the_first_ones_states():
    transformers = pytest.importorskip("transformers", reason="oracle: transformers")
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        vocab_size=20, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=32,
        attn_layers=["lsh"], axial_pos_embds=False, lsh_attn_chunk_length=8, num_buckets=8, num_hashes=2,
        hash_seed=0, is_decoder=True, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.ReformerModelWithLMHead(config).double().eval()
    tokens = torch.randint(1, 20, (2, 40))

    def decoded(rows):
        out, said = model(rows[:, :32], use_cache=True), []
        for t in range(32, 40):
            out = model(rows[:, t : t + 1], use_cache=True, past_buckets_states=out.past_buckets_states)
            said.append(out.logits[:, 0])
        return torch.stack(said, 1)

    with torch.no_grad():
        both, alone = decoded(tokens), torch.cat([decoded(tokens[:1]), decoded(tokens[1:])])
        away = (both - alone).abs().amax((1, 2))
        whole = model(tokens).logits[:1, 32:]
    assert float(away[0]) < 1e-12
    assert float(away[1]) > 0.1
    assert float((alone[:1] - whole).abs().max()) > 0.1  # and even the first is not the forward pass
