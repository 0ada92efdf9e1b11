"""Positions against transformers' own: rotations, rotary scalings, T5 buckets, ALiBi slopes."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import LlamaConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as apply_gptj  # noqa: E402
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: E402
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

from writehead.core.positions import Positions  # noqa: E402
from writehead.positions.alibi import ALiBi  # noqa: E402
from writehead.positions.rope import Rotary  # noqa: E402
from writehead.positions.t5 import T5Bias  # noqa: E402

T, H, D = 50, 3, 8
SCALINGS = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"name": "linear", "factor": 4.0}),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "name": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_context": 64
        },
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"name": "yarn", "factor": 4.0, "original_context": 64},
    ),
    "yarn with its options": (
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 128, "beta_fast": 16.0,
            "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False,
        },
        {
            "name": "yarn", "factor": 40.0, "original_context": 128, "beta_fast": 16.0, "beta_slow": 2.0,
            "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": 0.0,
        },
    ),
    "yarn with its own gain": (
        {
            "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25,
            "original_max_position_embeddings": 64
        },
        {"name": "yarn", "factor": 4.0, "original_context": 64, "attention_factor": 1.25},
    ),
}  # fmt: skip


def llama(scaling, head_dim=D, base=10000.0):
    context = int(scaling.get("factor", 1) * scaling.get("original_max_position_embeddings", 2048))
    return LlamaConfig(
        hidden_size=H * head_dim, num_attention_heads=H, head_dim=head_dim, max_position_embeddings=context,
        rope_parameters={**scaling, "rope_theta": base},
    )  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_dim", "base"), [(8, 10000.0), (64, 500000.0)])
def test_rotations_and_scalings_are_those_of_llama(name, head_dim, base):
    theirs, ours = SCALINGS[name]
    config = llama(theirs, head_dim, base)
    if name != "default":
        frequencies, gain = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
        mine = Rotary(head_dim, base=base, scaling=ours)
        torch.testing.assert_close(mine.frequencies.float(), frequencies, rtol=2e-6, atol=0)
        assert mine.gain == pytest.approx(gain, rel=1e-12)
    q, k = torch.randn(2, 2, T, H, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(T)[None])
    right = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    rotary = Rotary(head_dim, base=base, scaling=ours)
    for mine, other in zip((q, k), right, strict=True):
        turned = rotary.rotate(mine, Positions.range(2, 0, T))
        torch.testing.assert_close(turned, other.transpose(1, 2), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_interleaved_pairs_are_those_of_gpt_j(rotary_dim):
    x = torch.randn(1, T, H, D)
    sin, cos = create_sinusoidal_positions(T, rotary_dim)[None].split(rotary_dim // 2, -1)
    right = torch.cat([apply_gptj(x[..., :rotary_dim], sin, cos), x[..., rotary_dim:]], -1)
    rotary = Rotary(D, rotary_dim=rotary_dim, pairs="interleaved")
    torch.testing.assert_close(rotary.rotate(x, Positions.range(1, 0, T)), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (32, 512)])
def test_buckets_are_those_of_t5(bidirectional, buckets, most):
    scheme = T5Bias(1, buckets=buckets, max_distance=most, bidirectional=bidirectional)
    with torch.no_grad():
        scheme.table.copy_(torch.arange(float(buckets))[:, None])
    q, k = torch.tensor([[600]]), torch.arange(1200)[None]
    right = T5Attention._relative_position_bucket((k - q)[0], bidirectional, buckets, most)
    assert scheme.bias(q, k, torch.float64)[0, 0, 0].tolist() == right.tolist()


def test_slopes_are_those_of_bloom_and_mpt_for_any_number_of_heads():
    mask = torch.ones(1, 9, dtype=torch.int64)
    for heads in range(1, 65):
        ours = ALiBi(heads).bias(torch.tensor([[8]]), torch.arange(9)[None], torch.float32)[0, :, 0]
        bloom = build_alibi_tensor(mask, heads, torch.float32)[:, 0]  # counts from the first key
        torch.testing.assert_close(ours - ours[:, :1], bloom, rtol=1e-5, atol=1e-6)
        mpt = build_mpt_alibi_tensor(heads, 9)[:, 0]  # counts back from the last
        torch.testing.assert_close(ours, mpt, rtol=1e-5, atol=1e-6)
