"""LSH attention: the paper's equations, prefixes, constant state, transformers' Reformer, replayed buckets."""

import pytest
import torch
from reference.buckets import lsh

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.core.slots import Store
from writehead.core.state import nbytes
from writehead.core.work import Call
from writehead.laws import check
from writehead.mixers.reformer import LSH, unit
from writehead.model.decoder import Decoder
from writehead.positions.alibi import ALiBi
from writehead.positions.rope import Rotary

KINDS = {
    "shared": {},
    "shared, rounds count each": {"mode": "multiset", "rounds": 3},
    "two write-heads, rotary": {"kv_heads": 2, "position": Rotary(4)},
    "one write-head, factors": {"kv_heads": 1, "buckets": [2, 4], "window": 5},
    "another number of rounds in evaluation": {"rounds": 1, "eval_rounds": 4},
}


def make(**options) -> LSH:
    return LSH(16, **{"heads": 4, "buckets": 4, "window": 3, **options})


@pytest.mark.parametrize("law", ["split", "padding", "encode padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_obeys(kind, law):
    verdict = check(make(**KINDS[kind]), law, length=13)
    assert verdict.passed, verdict


@pytest.mark.parametrize("mode", ["set", "multiset"])
@pytest.mark.parametrize("window", [1, 4])
def test_shared_attention_is_the_papers_equations(mode, window):
    mixer = make(mode=mode, window=window, rounds=3).double()
    x = torch.randn(1, 14, 16, dtype=torch.float64, requires_grad=True)
    y, _, _ = mixer(x, Positions.range(1, 0, 14))
    qk, v = (m.weight.view(4, 4, 16) for m in (mixer.qk, mixer.v))
    right = torch.stack([
        lsh(row, qk, v, mixer.out.weight, mixer.hashes.rotations, window, once=mode == "set") for row in x
    ])  # fmt: skip
    assert torch.allclose(y, right, rtol=1e-11, atol=1e-11)
    weight, wanted = torch.randn_like(y), [x, mixer.qk.weight, mixer.v.weight]
    for a, b in zip(*(torch.autograd.grad((t * weight).sum(), wanted) for t in (y, right)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_state_is_constant_and_the_first_token_reads_itself():
    mixer = make().eval()
    x = torch.randn(1, 200, 16)
    state, sizes = mixer.init_state(1, x), set()
    with torch.no_grad():
        first, _, _ = mixer(x[:, :1], Positions.range(1, 0, 1))
        assert torch.allclose(first, mixer.out(mixer.v(x[:, :1])))
        for t in range(0, 200, 50):
            _, state, _ = mixer(x[:, t : t + 50], Positions.range(1, t, t + 50), state)
            sizes.add(nbytes(state))
    assert sizes == {mixer.state_bytes(1, 200, 4)}


@pytest.mark.parametrize("options", [{"mode": "set"}, {"mode": "paper", "window": 4}, {"kv_heads": 2}])
def test_whole_is_forward_without_a_state(options):
    mixer, x, pos = make(**options), torch.randn(2, 12, 16), Positions.range(2, 0, 12)
    assert torch.equal(mixer.whole(x, pos)[0], mixer(x, pos)[0])


def test_buckets_are_found_before_keys_are_turned():
    plain, turned = make(kv_heads=2), make(kv_heads=2, position=Rotary(4))
    turned.load_state_dict(plain.state_dict())
    x, pos = torch.randn(1, 9, 16), Positions.range(1, 50, 59)
    _, a, _ = plain(x, pos)
    _, b, _ = turned(x, pos)
    assert torch.equal(a.bucket, b.bucket)
    assert not torch.allclose(a.k, b.k)


def test_a_hash_in_factors_numbers_every_combination():
    mixer = make(buckets=[2, 4])
    x = torch.randn(3, 500, 4, 4)
    found, rotations = mixer.hashes(x, 2), mixer.hashes.rotations
    p = torch.einsum("bthd,hdrm->bthrm", x, rotations)
    first = torch.cat([p[..., :1], -p[..., :1]], -1).argmax(-1)
    second = torch.cat([p[..., 1:], -p[..., 1:]], -1).argmax(-1)
    assert torch.equal(found.long(), first + 2 * second)
    assert found.unique().tolist() == list(range(8))


def test_a_step_counts_keys_once_although_two_rounds_hold_them():
    mixer = make(buckets=2, rounds=4, window=8).double().eval()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, _, _ = mixer(x, Positions.range(2, 0, 30))
        _, state, _ = mixer(x[:, :29], Positions.range(2, 0, 29))
        y, _, _ = mixer(x[:, 29:], Positions.range(2, 29, 30), state)
    assert torch.allclose(y[:, 0], whole[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rounds", "buckets"), [(1, 4), (3, [2, 4])])
@pytest.mark.parametrize("length", [32, 6])
def test_the_papers_form_is_transformers_reformer(causal, rounds, buckets, length):
    modeling = pytest.importorskip(
        "transformers.models.reformer.modeling_reformer", reason="oracle: transformers"
    )
    from transformers import ReformerConfig

    config = ReformerConfig(
        hidden_size=16, num_attention_heads=2, attention_head_size=8, lsh_attn_chunk_length=8, num_buckets=buckets,
        num_hashes=rounds, hash_seed=0, is_decoder=causal, lsh_attention_probs_dropout_prob=0.0,
        attn_layers=["lsh"], max_position_embeddings=64,
    )  # fmt: skip
    theirs = modeling.LSHSelfAttention(config).double().eval()
    ours = LSH(16, heads=2, buckets=buckets, rounds=rounds, window=8, mode="paper").double()
    x = torch.randn(3, length, 16, dtype=torch.float64)
    with torch.no_grad():
        ours.qk.weight.copy_(theirs.query_key.weight)
        ours.v.weight.copy_(theirs.value.weight)
        ours.out.weight.copy_(torch.eye(16))
        torch.manual_seed(0)  # what hash_seed=0 makes them draw, again at every call
        ours.hashes.rotations.copy_(torch.randn(ours.hashes.rotations.shape, dtype=torch.float64))
        right = theirs(x).hidden_states
        pos = Positions.range(3, 0, length)
        y = ours(x, pos)[0] if causal else ours.encode(x, pos)[0]
    # their self-mask of -1e5 takes the place of an empty row, but swallows the score's digits there
    assert float((y - right).abs().max()) < 1e-6


def test_the_papers_form_with_padding_keeps_it_out():
    ours = make(mode="paper", window=4, buckets=4).double()
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    index = torch.cat([torch.arange(10), torch.full((6,), -1)])[None]
    with torch.no_grad():
        y, _, _ = ours(x, Positions(index))
        x[:, 10:] = 1e6
        z, _, _ = ours(x, Positions(index))
    assert torch.equal(y[:, :10], z[:, :10])


def test_the_papers_form_is_not_consistent_and_refuses_to_decode():
    mixer = make(mode="paper", window=4, buckets=8, rounds=1).eval()
    x = torch.randn(1, 40, 16)
    with torch.no_grad():
        whole, state, _ = mixer(x, Positions.range(1, 0, 40))
        part, _, _ = mixer(x[:, :24], Positions.range(1, 0, 24))
    assert state is None
    changed = ((whole[:, :24] - part).abs() > 1e-4).any(-1).sum()
    assert int(changed) > 4
    with pytest.raises(ValueError, match=r'mode="paper" cannot decode: .*mode="set" or "multiset" decodes'):
        mixer.init_state(1, x)
    with pytest.raises(ValueError, match='mode="paper" cannot decode'):
        mixer(x, Positions.range(1, 0, 40), make().init_state(1, x))


def test_a_key_has_length_one():
    assert torch.allclose(unit(torch.randn(5, 8)).norm(dim=-1), torch.ones(5), atol=1e-4)


def test_work_of_one_token_does_not_grow_with_the_context():
    mixer = make(window=8)
    far, near = (mixer.work(Call(context=context)) for context in (10**6, 10**3))
    assert far == near
    assert far.flops > 2 * 16 * 16 * 3
    assert mixer.work(Call(context=2)).state_read < near.state_read


def test_a_reversible_decoder_of_lsh_and_local_layers_trains_with_the_buckets_of_the_forward_pass():
    config = ModelConfig(
        vocab=11, dim=16, depth=4, position={"name": "sinusoidal"}, stack={"name": "reversible", "dropout": 0.2},
        mixer=({"name": "local_mha", "heads": 4}, {"name": "reformer", "heads": 4, "buckets": 4, "window": 3}),
        feedforward={"name": "chunked", "chunk": 8, "hidden": 32},
    )  # fmt: skip
    model = Decoder(config)
    tokens = torch.randint(11, (2, 33))
    asked = []
    original = model.stack.blocks[1].mixer.hashes.forward
    model.stack.blocks[1].mixer.hashes.forward = lambda *args: asked.append(1) or original(*args)
    model(tokens)[0].square().sum().backward()
    assert asked == [1]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "papr"}, "unknown mode 'papr'; did you mean 'paper'"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"buckets": 5}, "buckets=5 must be a positive multiple of half-spaces=2; nearest is 4"),
        ({"buckets": [256, 256]}, r"buckets=\[256, 256\] make 65536 in all; at most 32768 are kept"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"heads": 3}, "dim=16 must be a positive multiple of heads=3"),
        ({"kv_heads": 3}, "heads=4 must be a positive multiple of kv_heads=3"),
        ({"position": ALiBi(4)}, "LSH attention adds no bias to scores; use rotary"),
        (
            {"mode": "paper", "kv_heads": 2},
            'mode="paper" has shared queries and keys: leave kv_heads out; got 2',
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_rings_in_sixteen_bits_are_smaller_and_int8_is_refused():
    mixer, x = make(), torch.randn(1, 5, 16)
    _, state, _ = mixer(x, Positions.range(1, 0, 5), mixer.init_state(1, x, Store(dtype=torch.bfloat16)))
    assert state.k.dtype == torch.bfloat16
    assert (
        nbytes(state) == mixer.state_bytes(1, 5, 4, Store(dtype=torch.bfloat16)) < mixer.state_bytes(1, 5, 4)
    )
    with pytest.raises(ValueError, match="rings of buckets hold no int8; use a cache dtype of float32"):
        mixer.init_state(1, x, Store(dtype=torch.int8))
