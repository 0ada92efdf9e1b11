"""GGUF files of the Llama family: names and metadata of llama.cpp as our config and weights.

For the architecture "llama" llama.cpp's converter reorders the rows of each query and key head so that pairs
which turn together are neighbours; the rules put them back. For "qwen2" and "gemma" it leaves them as they
are. Gemma's norms are stored with the one already added.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from writehead.config import ModelConfig
from writehead.convert.errors import BadFile, shown
from writehead.convert.families.base import REQUIRED, Fields
from writehead.convert.gguf import GGUF
from writehead.convert.quants import integers
from writehead.convert.rules import HALVES, QKV_ROWS, Checkpoint, Form, Heads, Rule
from writehead.core.shapes import check_choice
from writehead.positions.rope import Rotary

ARCHITECTURES = ("gemma", "llama", "qwen2")
LAYER = "stack.blocks.{layer}."
FACTORS = "rope_freqs.weight"


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows in halves (i pairs with i + D/2) -> rows in pairs (2i with 2i + 1), head by head."""
    paired: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return paired


def _halves(rows: Tensor, heads: int) -> Tensor:
    halved: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halved


def _join(parts: Sequence[Tensor], heads: Heads) -> Tensor:
    q, k, v = parts
    return torch.cat([_halves(q, heads.H), _halves(k, heads.G), v])


def _split(ours: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    q, k, v = QKV_ROWS.split(ours, heads)
    return _neighbours(q, heads.H), _neighbours(k, heads.G), v


PAIRED = Form(_join, _split)


def rules(architecture: str, config: ModelConfig) -> tuple[Rule, ...]:
    """The table for a model."""
    qkv_form = PAIRED if architecture == "llama" else QKV_ROWS
    tied = ("output.weight",) if config.tie_embeddings else ()
    table = [
        Rule("embedding.table", ("token_embd.weight",), copies=tied),
        Rule("embedding.output", ("output.weight",)),
        Rule("stack.norm.weight", ("output_norm.weight",)),
        Rule(LAYER + "mixer_norm.weight", ("blk.{layer}.attn_norm.weight",)),
        Rule(LAYER + "feedforward_norm.weight", ("blk.{layer}.ffn_norm.weight",)),
    ]
    for kind in ("weight", "bias"):
        table += [
            Rule(
                f"{LAYER}mixer.qkv.{kind}", tuple(f"blk.{{layer}}.attn_{x}.{kind}" for x in "qkv"), qkv_form
            ),
            Rule(f"{LAYER}mixer.out.{kind}", (f"blk.{{layer}}.attn_output.{kind}",)),
            Rule(
                f"{LAYER}feedforward.inner.{kind}",
                tuple(f"blk.{{layer}}.ffn_{x}.{kind}" for x in ("gate", "up")),
                HALVES,
            ),
            Rule(f"{LAYER}feedforward.outer.{kind}", (f"blk.{{layer}}.ffn_down.{kind}",)),
        ]
    return tuple(table)


def read_config(file: GGUF) -> tuple[str, ModelConfig]:
    """The architecture and the model that a file's metadata describe.

    Raises:
        BadFile: another architecture, or a setting that we cannot honour.
    """
    try:
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError("the metadata lack general.architecture")
        check_choice("architecture", architecture, ARCHITECTURES)
        return architecture, _config(architecture, file)
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(file.path, str(error)) from error


def _config(architecture: str, file: GGUF) -> ModelConfig:
    start = architecture + "."
    own = {key.removeprefix(start): value for key, value in file.metadata.items() if key.startswith(start)}
    fields = Fields({key: _plain(value) for key, value in own.items()}, f"metadata {architecture}")
    dim, depth = fields.whole("embedding_length", REQUIRED), fields.whole("block_count", REQUIRED)
    heads = fields.whole("attention.head_count", REQUIRED)
    head_dim = fields.maybe_whole("attention.key_length") or max(1, dim // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.take(key, head_dim) != head_dim:
            raise ValueError(f"{key}={shown(fields.take(key, None))} must be the width of a head, {head_dim}")
    eps = fields.number("attention.layer_norm_rms_epsilon", REQUIRED)
    names = file.tensors.keys()
    mixer: dict[str, Any] = {
        "name": "gqa",
        "heads": heads,
        "kv_heads": fields.whole("attention.head_count_kv", heads),
        "bias": _bias(names, "attn_q", "attn_output"),
    }
    if head_dim * heads != dim:
        mixer["head_dim"] = head_dim
    window = fields.maybe_whole("attention.sliding_window")
    if window is not None:
        mixer["pattern"] = {"name": "window", "window": window}
    context = fields.whole("context_length", REQUIRED)
    position = {"name": "rotary", "base": fields.number("rope.freq_base", 10000.0)}
    config = ModelConfig(
        vocab=_rows(file, "token_embd.weight"),
        dim=dim,
        depth=depth,
        mixer=mixer,
        feedforward={
            "name": "dense",
            "hidden": fields.whole("feed_forward_length", REQUIRED),
            "activation": "gelu_tanh" if architecture == "gemma" else "silu",
            "gated": True,
            "bias": "blk.0.ffn_up.bias" in names,
        },
        position=position | _scaling(fields, context, file),
        stack={"name": "residual", "norm": "rms", "eps": eps},
        tie_embeddings="output.weight" not in names,
        embed_scale=dim**0.5 if architecture == "gemma" else 1.0,
        max_context=context,
    )
    fields.only("expert_count", None, 0)
    fields.only("expert_used_count", None, 0)
    fields.only("attention.causal", True)
    fields.ignore("vocab_size", "tensor_data_layout")
    fields.done()
    return config


def _scaling(fields: Fields, context: int, file: GGUF) -> dict[str, Any]:
    """The rotary scaling: linear and YaRN stand in the metadata, Llama 3's is a tensor of divisors."""
    kind = fields.take("rope.scaling.type", "none")
    factor = fields.take("rope.scaling.factor", None)
    original = fields.maybe_whole("rope.scaling.original_context_length") or context
    if FACTORS in file.tensors:
        if kind != "none":
            raise ValueError(f"both rope.scaling.type={shown(kind)} and {FACTORS} scale the rotation")
        return {"scaling": _llama3(file, fields.number("rope.freq_base", 10000.0))}
    if kind == "none":
        return {}
    if kind == "linear" and factor is not None:
        return {"scaling": {"name": "linear", "factor": fields.number("rope.scaling.factor", None)}}
    if kind == "yarn" and factor is not None:
        factor = fields.number("rope.scaling.factor", None)
        return {"scaling": {"name": "yarn", "factor": factor, "original_context": original}}
    raise ValueError(f"rope.scaling.type={shown(kind)} is not supported (accepted: none, linear, yarn)")


def _llama3(file: GGUF, base: float) -> dict[str, Any]:
    """The scaling of which a file holds only the result; all Llama 3 share its settings but the factor."""
    given = file.read(FACTORS)
    if given.dim() == 1 and 1 <= float(given.max()) < 1e6:
        scaling = {"name": "llama3", "factor": round(float(given.max()), 3), "original_context": 8192}
        R = 2 * len(given)
        divisors = Rotary(R, base=base).frequencies / Rotary(R, base=base, scaling=scaling).frequencies
        if torch.allclose(divisors, given.double(), rtol=1e-3):
            return scaling
    raise ValueError(f"{FACTORS} is not the scaling of Llama 3 (low 1, high 4, original context 8192)")


def _bias(names: Any, inputs: str, output: str) -> str:
    has = [f"blk.0.{part}.bias" in names for part in (inputs, output)]
    return "all" if all(has) else "qkv" if has[0] else "none"


def _rows(file: GGUF, name: str) -> int:
    if name not in file.tensors:
        raise ValueError(f"the tensor {name} is missing")
    return file.tensors[name].shape[0]


def _plain(value: Any) -> Any:
    """Numbers that a file gives once for each layer, as one if all are equal."""
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        return value[0].item()
    return value


class Decoded(Mapping[str, Tensor]):
    """A GGUF file's tensors, dequantised when asked for."""

    def __init__(self, file: GGUF, dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.file.read(name, self.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape

    def rows(self, name: str, some: slice) -> Tensor:
        return self.file.read(name, self.dtype, some)

    def integers(self, name: str, format: str) -> tuple[Tensor, Tensor] | None:
        """A matrix's blocks as `quants.integers` gives them."""
        info = self.file.tensors[name]
        return integers(self.file.raw(name), info.type, format) if len(info.shape) == 2 else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.tensors)

    def __len__(self) -> int:
        return len(self.file.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.file.tensors


def open_model(file: GGUF, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A GGUF file as a checkpoint to load; `dtype` is what its blocks are decoded to.

    Raises:
        BadFile: a model that we do not have.
    """
    architecture, config = read_config(file)
    side = max(size for info in file.tensors.values() for size in info.shape)
    return Checkpoint(config, rules(architecture, config), Decoded(file, dtype), side, (FACTORS,))
