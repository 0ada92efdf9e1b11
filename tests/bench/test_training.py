"""The training benchmark compares equal models, each doing a whole step."""

from pathlib import Path

import pytest
import torch

from writehead.bench.training import Shape, Twin, compare, llama, our_step, ours, plain_step
from writehead.config import ModelConfig
from writehead.model.decoder import Decoder

SMALL = Shape(vocab=300, dim=16, depth=2, heads=2, hidden=24, batch=2, length=8)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_compared_models_are_of_one_size() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    vaswani, plain = (
        Decoder(ModelConfig.from_dict(ours(SMALL, kind)["model"])) for kind in ("vaswani", "llama")
    )
    assert count(vaswani) == count(Twin(SMALL))
    assert count(plain) == count(llama(SMALL))


def test_the_twin_of_pytorchs_layers_computes_our_model() -> None:
    model, twin = Decoder(ModelConfig.from_dict(ours(SMALL, "vaswani")["model"])).eval(), Twin(SMALL).eval()
    with torch.no_grad():
        twin.table.copy_(model.embedding.table)
        for block, layer in zip(model.blocks, twin.layers, strict=True):
            layer.self_attn.in_proj_weight.copy_(block.mixer.qkv.weight)
            layer.self_attn.out_proj.weight.copy_(block.mixer.out.weight)
            layer.self_attn.out_proj.bias.copy_(block.mixer.out.bias)
            layer.linear1.weight.copy_(block.feedforward.inner.weight)
            layer.linear1.bias.copy_(block.feedforward.inner.bias)
            layer.linear2.weight.copy_(block.feedforward.outer.weight)
            layer.linear2.bias.copy_(block.feedforward.outer.bias)
        tokens = torch.randint(0, 300, (2, 8))
        torch.testing.assert_close(twin.train()(tokens), model(tokens)[0], rtol=1e-4, atol=1e-5)


def test_a_step_of_each_kind_changes_the_weights(tmp_path: Path) -> None:
    twin = Twin(SMALL)
    before = twin.table.detach().clone()
    plain_step(twin, SMALL)()
    assert not torch.equal(twin.table, before)
    with our_step(SMALL, "llama mqa", tmp_path) as step:
        step()
        step()
    assert (tmp_path / "llama-mqa" / "run.yaml").exists()


@pytest.mark.slow
def test_every_case_is_measured() -> None:
    found = compare(SMALL, rounds=1, say=lambda text: None)
    assert len(found) >= 4
    assert all(t.median > 0 and not t.error for t in found.values())
