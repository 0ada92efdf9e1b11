"""Runs of the papers with fixed patterns, by name: at the published size, and as toys that take minutes.

`writehead train` takes a preset, with the paper's data replaced by what a user names, and commands that read
a config its model. Where that is not the paper's, `differs` says so; what no paper states is ours: batches,
steps and learning rates of encoders, and the data.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from writehead.config import ModelConfig

Values = dict[str, Any]


class Preset(NamedTuple):
    """One run.

    Attributes:
        paper: arXiv number.
        vocab: tokens of the paper's model; in training the tokenizer gives them.
        run: sections of a run, over the defaults.
        published: parameters in millions that the paper states, if it does.
        lacking: parameters of the paper's model that ours does not have.
        differs: where the model is another than the paper's.
    """

    paper: str
    vocab: int
    run: Values
    published: int | None = None
    lacking: int = 0
    differs: str = ""

    @property
    def config(self) -> ModelConfig:
        """The model, with the paper's vocabulary."""
        return ModelConfig.from_dict({"vocab": self.vocab, **self.run["model"]})


def _model(dim: int, depth: int, mixer: Any, hidden: int, **more: Any) -> Values:
    """A model of images or of text to be continued: pre-norm, with biases."""
    feedforward = {
        "name": "dense",
        "hidden": hidden,
        "bias": True,
        "activation": more.pop("activation", "gelu"),
    }
    stack = {"name": "residual", "norm": "layer"} | more.pop("stack", {})
    given = {"dim": dim, "depth": depth, "mixer": mixer, "feedforward": feedforward, "stack": stack}
    return given | {"tie_embeddings": False, **more}


def _encoder(dim: int, depth: int, mixer: Any, context: int, **more: Any) -> Values:
    """BERT's body: post-norm, a masked-word head."""
    made = _model(dim, depth, mixer, 4 * dim, stack={"order": "post", "eps": 1e-12, "last_norm": False})
    made["stack"]["dropout"] = 0.1
    return made | {
        "kind": "encoder",
        "tie_embeddings": True,
        "position": {"name": "learned", "max_context": context},
        "embed_norm": True,
        "embed_norm_last": True,
        "head_transform": "gelu",
        "head_bias": True,
        **more,
    }


def _pixels(height: int, width: int, channels: int = 1, **more: Any) -> Values:
    """Images and the positions of their levels; not tied, since a model of pixels has tables of its own."""
    shape = [height, width] if channels == 1 else [height, width, channels]
    patch = {"patch": more["patch"]} if "patch" in more else {}
    size = {"height": height, "width": width, "channels": channels}
    return {
        "pixels": {"name": "categorical", **size, **more},
        "position": {"name": "grid", "shape": shape, **patch},
        "tie_embeddings": True,
    }


def _text(length: int, batch: int) -> Values:
    return {"kind": "text", "train": ["stdlib"], "length": length, "batch": batch}


def _masked(length: int, batch: int, vocab: int) -> Values:
    tokenizer = {"name": "bpe", "vocab": vocab}
    return {"kind": "masked", "train": ["stdlib"], "tokenizer": tokenizer, "length": length, "batch": batch}


def _images(batch: int, file: str = "mnist.npz:x_train") -> Values:
    return {"kind": "image", "train": [file], "batch": batch}


def _optim(lr: float, warmup: int, **more: Any) -> Values:
    return {"lr": lr, "warmup": warmup, "weight_decay": 0.01, **more}


def _sparse(**more: Any) -> Values:
    return {"name": "sparse_fixed", "heads": 8, **more}


def _etc(depth: int, dim: int, heads: int, tokens: int, **more: Any) -> Values:
    mixer = {"name": "etc", "heads": heads, "tokens": tokens, **more}
    return _encoder(dim, depth, mixer, 1, position={"name": "none"}, token_types=2)


def _cpc(tokens: int) -> Values:
    """The paper's pre-training: 0.8 of masked words, 0.2 of hidden sentences."""
    return {
        "masks": {"summaries": tokens, "sentences": 0.1},
        "loss": {"aux": {"cpc_loss": 0.25}},
    }


def _dilated(window: int, dilation: int) -> Values:
    """Eight heads that look back, two of them with gaps."""
    plain = {"name": "window", "window": window}
    gaps = plain if dilation == 1 else {"name": "dilated", "window": window, "dilation": dilation}
    return {"name": "mha", "heads": 8, "pattern": {"name": "per_head", "patterns": [plain] * 6 + [gaps] * 2}}


BOOKS = {"optim": _optim(1e-4, 10_000, schedule="linear", final=0.0), "loop": {"steps": 500_000}}
IMAGES = {"optim": _optim(3.5e-4, 5000)}
TOY = {"optim": _optim(1e-3, 100), "loop": {"steps": 1500}}
BYTES = 259  # the byte tokenizer's tokens
BERT, ROBERTA = 30522, 50265
CLASSES = 257  # levels of a byte, and the token that begins

PRESETS: Mapping[str, Preset] = {
    "sparse-enwik8": Preset(
        "arXiv:1904.10509", 256,
        {"model": _model(512, 30, _sparse(stride=128, columns=32), 2048, init="sparse",
                         stack={"dropout": 0.4}, position={"name": "grid", "shape": [96, 128]}),
         "data": _text(12288, 8), **IMAGES},
        95,
    ),
    "sparse-cifar10": Preset(
        "arXiv:1904.10509", CLASSES,
        {"model": _model(256, 128, {"name": "sparse_strided", "heads": 2, "head_dim": 64}, 512, init="sparse",
                         stack={"dropout": 0.25}, **_pixels(32, 32, 3)),
         "data": _images(16, "cifar10.npz:x_train"), **IMAGES},
        59, 128 * 2 * 64 * 2 * 256,
        "values have half of the width like queries and keys; the paper's have all of it",
    ),
    "sparse-imagenet64": Preset(
        "arXiv:1904.10509", CLASSES,
        {"model": _model(512, 48, {"name": "sparse_strided", "heads": 16, "stride": 128}, 2048, init="sparse",
                         stack={"dropout": 0.01}, **_pixels(64, 64, 3)),
         "data": _images(16, "imagenet64.npz:x_train"), **IMAGES},
        152,
    ),
    "sparse-toy": Preset(
        "arXiv:1904.10509", BYTES,
        {"model": _model(128, 4, {**_sparse(stride=32, columns=8), "heads": 4}, 512, init="sparse",
                         position={"name": "grid", "shape": [16, 32]}),
         "data": _text(512, 8), **TOY},
    ),
    "block-bert-base": Preset(
        "arXiv:1911.02972", ROBERTA,
        {"model": _encoder(768, 12, {"name": "block_bert", "heads": 12, "blocks": 2}, 512),
         "data": _masked(512, 256, ROBERTA), **BOOKS},
    ),
    "block-bert-base-3": Preset(
        "arXiv:1911.02972", ROBERTA,
        {"model": _encoder(768, 12, {"name": "block_bert", "heads": 12, "blocks": 3}, 1024),
         "data": _masked(1024, 256, ROBERTA), **BOOKS},
    ),
    "block-bert-toy": Preset(
        "arXiv:1911.02972", 4096,
        {"model": _encoder(128, 4, {"name": "block_bert", "heads": 4, "blocks": 2}, 256),
         "data": _masked(256, 8, 4096), **TOY},
    ),
    "image-transformer-cifar10": Preset(
        "arXiv:1802.05751", CLASSES,
        {"model": _model(512, 12, {"name": "image_1d", "heads": 4, "block": 256, "memory": 256}, 2048,
                         activation="relu", stack={"order": "post", "dropout": 0.3, "last_norm": False},
                         **_pixels(32, 32, 3)),
         "data": _images(16, "cifar10.npz:x_train"), **IMAGES},
    ),
    "image-transformer-2d": Preset(
        "arXiv:1802.05751", CLASSES,
        {"model": _model(512, 12, {"name": "image_2d", "heads": 4, "image_width": 96, "patch": [16, 16],
                                   "margin": [16, 32]}, 2048, activation="relu",
                         stack={"order": "post", "dropout": 0.3, "last_norm": False},
                         **_pixels(32, 32, 3, patch=[16, 16])),
         "data": _images(16, "cifar10.npz:x_train"), **IMAGES},
    ),
    "image-transformer-toy": Preset(
        "arXiv:1802.05751", 5,
        {"model": _model(64, 4, {"name": "image_1d", "heads": 2, "block": 28, "memory": 84}, 256,
                         activation="relu", **_pixels(28, 28, levels=4)),
         "data": _images(4), **TOY},
    ),
    "axial-imagenet32": Preset(
        "arXiv:1912.12180", CLASSES,
        {"model": _model(1536, 16, {"name": "axial", "heads": 16}, 1536, init="axial",
                         stack={"name": "axial_decoders", "image_width": 96, "outer": 8, "dropout": 0.04},
                         **_pixels(32, 32, 3)),
         "data": _images(64, "imagenet32.npz:x_train"), "optim": _optim(1e-4, 5000)},
        None, 0, "channels are columns, so the eight layers of the exterior encoder are left out",
    ),
    "axial-toy": Preset(
        "arXiv:1912.12180", 5,
        {"model": _model(64, 4, {"name": "axial", "heads": 2}, 128, init="axial",
                         stack={"name": "axial_decoders", "image_width": 28, "outer": 2},
                         **_pixels(28, 28, levels=4)),
         "data": _images(4), **TOY},
    ),
    "longformer-text8": Preset(
        "arXiv:2004.05150", BYTES,
        {"model": _model(512, 12, [_dilated(512 << min(i // 2, 4), max(1, i // 2 - 1)) for i in range(12)],
                         2048, stack={"dropout": 0.2}, position={"name": "rotary"}),
         "data": _text(23040, 16), "optim": _optim(2.5e-4, 10_000), "loop": {"clip": 0.25}},
        41, 12 * 512 * 512,
        "rotary positions in place of relative ones with a projection in each layer; windows are 512 to 8192 "
        "as in the last phase and double every second layer, which the paper leaves open",
    ),
    "longformer-base": Preset(
        "arXiv:2004.05150", ROBERTA,
        {"model": _encoder(768, 12, {"name": "longformer", "heads": 12, "window": 512}, 4096),
         "data": _masked(4096, 64, ROBERTA), **BOOKS},
    ),
    "longformer-toy": Preset(
        "arXiv:2004.05150", BYTES,
        {"model": _model(128, 4, [_dilated(32 << i, 1 + i // 2) for i in range(4)], 512,
                         position={"name": "rotary"}),
         "data": _text(512, 8), **TOY},
    ),
    "big-bird-base": Preset(
        "arXiv:2007.14062", ROBERTA,
        {"model": _encoder(768, 12, {"name": "big_bird", "heads": 12, "block": 64, "random": 3}, 4096),
         "data": _masked(4096, 256, ROBERTA), **BOOKS},
    ),
    "big-bird-toy": Preset(
        "arXiv:2007.14062", 4096,
        {"model": _encoder(128, 4, {"name": "big_bird", "heads": 4, "block": 16, "random": 1}, 512),
         "data": _masked(512, 8, 4096), **TOY},
    ),
    "etc-base": Preset(
        "arXiv:2004.08483", BERT,
        {"model": _etc(12, 768, 12, 230), "data": _masked(4096, 512, BERT), **_cpc(230), **BOOKS},
        166, 0, "both kinds of tokens share the stack's norms",
    ),
    "etc-base-shared": Preset(
        "arXiv:2004.08483", BERT,
        {"model": _etc(12, 768, 12, 230, projections="shared"), "data": _masked(4096, 512, BERT), **_cpc(230),
         **BOOKS},
        109, 0, "both kinds of tokens share the stack's norms",
    ),
    "etc-large": Preset(
        "arXiv:2004.08483", BERT,
        {"model": _etc(24, 1024, 16, 230, radius=169, clip=24), "data": _masked(4096, 512, BERT), **_cpc(230),
         **BOOKS},
        539, 0, "both kinds of tokens share the stack's norms",
    ),
    "etc-toy": Preset(
        "arXiv:2004.08483", 4096,
        {"model": _etc(4, 128, 4, 16, radius=31), "data": _masked(256, 8, 4096), **_cpc(16), **TOY},
    ),
}  # fmt: skip
