"""The prefix form is the Linformer of every token's past; layers may share one projection."""

import pytest
import torch
from reference.linformer import prefix as reference

from writehead.config import ModelConfig
from writehead.core.positions import Positions
from writehead.core.state import nbytes
from writehead.mixers import linformer_prefix
from writehead.mixers.linformer_prefix import LinformerPrefix
from writehead.model.decoder import Decoder
from writehead.model.parts import weights
from writehead.ops import prefix

EXACT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.mark.parametrize("piece", [64, 3])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("sharing", ["none", "heads", "key_value", "layers"])
def test_each_token_reads_the_linformer_of_its_past_with_its_gradients(sharing, kv_heads, piece, monkeypatch):
    monkeypatch.setattr(prefix, "PIECE", piece)
    monkeypatch.setattr(linformer_prefix, "PIECE", piece + 1)
    mixer = LinformerPrefix(8, heads=4, kv_heads=kv_heads, max_context=9, rank=3, sharing=sharing).double()
    q, k, v = mixer.qkv.weight.unflatten(0, (-1, 2)).split([4, kv_heads, kv_heads])
    e, f = mixer.project.expand(9, 2, kv_heads, 3).permute(1, 2, 3, 0)
    x = torch.randn(2, 7, 8).double().requires_grad_()
    right = torch.stack([reference(row, q, k, v, e, f, mixer.out.weight) for row in x])
    y, _, aux = mixer(x, Positions.range(2, 0, 7))
    torch.testing.assert_close(y, right, **EXACT)
    assert aux == {}
    weight, wanted = torch.randn_like(y), (x, *mixer.parameters())
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad((right * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def config(**changes):
    mixer = {"name": "linformer_prefix", "heads": 2, "max_context": 9, "rank": 3, "sharing": "layers"}
    return ModelConfig(
        vocab=11, dim=8, depth=3, mixer=({**mixer}, {**mixer, **changes}), position={"name": "none"}
    )


def test_layers_share_one_projection_that_is_saved_and_trained_once():
    model = Decoder(config())
    assert [name for name in weights(model) if "project" in name] == ["stack.blocks.0.mixer.project"]
    first, _, third = (block.mixer for block in model.blocks)
    assert first.project is third.project
    model(torch.randint(11, (2, 9)))[0].sum().backward()
    assert first.project.grad.abs().sum() > 0


def test_with_one_write_head_the_state_is_smaller_by_the_number_of_heads():
    sizes = []
    for kv_heads in (4, 1):
        mixer = LinformerPrefix(8, heads=4, kv_heads=kv_heads, max_context=9, rank=3)
        sizes.append(nbytes(mixer.init_state(2, torch.zeros(1))))
        assert sizes[-1] == mixer.state_bytes(2, 9, 4)
    assert sizes[0] == 4 * sizes[1]


def test_layers_that_cannot_share_and_positions_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match=r'sharing="layers" need one max_context and one rank; got 9 and 3, then 9 and 5'
    ):
        Decoder(config(rank=5))
    with pytest.raises(ValueError, match=r"position 9 does not exist: this mixer has 9 positions \(0 to 8\)"):
        Decoder(config())(torch.zeros(1, 10, dtype=torch.int64))
