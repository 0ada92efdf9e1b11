"""Longformer and Big Bird against transformers, weights copied; local attention against its package."""

import math

import pytest
import torch
from torch import nn

from writehead.core.pattern import Image1D
from writehead.core.positions import Positions
from writehead.mixers.big_bird import BigBird
from writehead.mixers.longformer import Longformer
from writehead.ops.blocks import block_attend
from writehead.positions.base import Scheme

HEADS = 2


def copy_qkv(qkv, query, key, value):
    """Three projections of transformers as the rows of ours."""
    with torch.no_grad():
        qkv.weight.copy_(torch.cat([query.weight, key.weight, value.weight]))
        qkv.bias.copy_(torch.cat([query.bias, key.bias, value.bias]))


def disturbed(model):
    """Weights of a size that lets attention tell keys apart."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval().double()


def attention_of(model, layer, **inputs):
    """What goes into a layer's self-attention and what comes out, before the output projection."""
    seen = {}

    def before(_, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    module = model.encoder.layer[layer].attention.self
    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(
            lambda _, __, out: seen.update(y=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return module, seen["x"], seen["y"]


def ours_without_output(mixer):
    mixer = mixer.double()
    mixer.out = nn.Identity()
    return mixer


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.slow
def test_longformer_equals_transformers_with_padding_and_ragged_global_tokens(transformers):
    config = transformers.LongformerConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=32,
        attention_window=[4, 8], max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    model = disturbed(transformers.LongformerModel(config))
    ids = torch.randint(2, 20, (2, 24))
    padding = torch.ones_like(ids)
    padding[1, 17:] = 0
    marked = torch.zeros_like(ids)
    marked[0, [0, 5, 11]] = 1
    marked[1, 0] = 1
    for layer, window in enumerate((4, 8)):
        module, x, y = attention_of(
            model, layer, input_ids=ids, attention_mask=padding, global_attention_mask=marked
        )
        mixer = ours_without_output(Longformer(16, heads=HEADS, window=window))
        copy_qkv(mixer.qkv, module.query, module.key, module.value)
        copy_qkv(mixer.global_qkv, module.query_global, module.key_global, module.value_global)
        index = torch.where(padding > 0, torch.arange(24), -1)
        with torch.no_grad():
            got, _ = mixer.encode(x[:, :24], Positions(index), marked > 0)
        real = padding > 0
        torch.testing.assert_close(
            got[real], y[:, :24][real], rtol=1e-5, atol=1e-6
        )  # theirs has a float32 softmax


class Repeated(Scheme):
    """Counts the keys of block 0 1 + r times for middle rows: in eval mode transformers' random table is 0."""

    def __init__(self, block, count, last):
        super().__init__()
        self.block, self.count, self.last = block, count, last

    def bias(self, q, k, dtype):
        row = q[:, None, :, None] // self.block
        often = (k[:, None, None, :] // self.block == 0) & (row > 0) & (row < self.last)
        return often.to(dtype) * math.log(1 + self.count)


@pytest.mark.slow
def test_big_bird_equals_transformers_where_its_random_blocks_are_all_block_0(transformers):
    block, count, length = 4, 1, 64
    config = transformers.BigBirdConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=32,
        block_size=block, num_random_blocks=count, max_position_embeddings=64, attention_type="block_sparse",
    )  # fmt: skip
    model = disturbed(transformers.BigBirdModel(config))
    module, x, y = attention_of(model, 0, input_ids=torch.randint(2, 20, (2, length)))
    scheme = Repeated(block, count, length // block - 1)
    mixer = ours_without_output(BigBird(16, heads=HEADS, block=block, random=0, position=scheme))
    copy_qkv(mixer.qkv, module.query, module.key, module.value)
    with torch.no_grad():
        got, _ = mixer.encode(x, Positions.range(2, 0, length))
    torch.testing.assert_close(got, y.reshape(got.shape), rtol=1e-6, atol=1e-7)


def test_image_transformer_in_one_dimension_equals_local_attention():
    package = pytest.importorskip("local_attention", reason="local-attention is not installed")
    theirs = package.LocalAttention(
        dim=8,
        window_size=6,
        causal=True,
        look_backward=1,
        look_forward=0,
        use_rotary_pos_emb=False,
        autopad=True,
    )
    q, k, v = (torch.randn(2, 29, 3, 8) for _ in range(3))
    right = theirs(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    y = block_attend(q, k, v, Image1D(6, 6), size=5)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6)
