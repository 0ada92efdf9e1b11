"""A training run, fully described: what each of its values means, and which are refused."""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from writehead.catalog import Spec
from writehead.core.shapes import check_choice
from writehead.train.values import at_least, plain, section

KINDS = {
    "text": ("decoder",),
    "masked": ("encoder",),
    "labelled": ("encoder", "decoder"),
    "parallel": ("seq2seq",),
    "image": ("decoder",),
}
NOT_OF_IMAGES = ("fields", "tokenizer", "length")
OPTIMISERS = ("adamw", "adafactor")
SCHEDULES = ("cosine", "linear", "inverse_sqrt", "constant")
DEFAULT_MODEL: Spec = types.MappingProxyType(
    {
        "dim": 128,
        "depth": 4,
        "mixer": {"name": "mqa", "heads": 4},
        "feedforward": {"name": "dense", "hidden": 512},
    }
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from.

    Attributes:
        kind: "text" (a stream), "masked" (a stream with words left out), "labelled" (texts and classes),
            "parallel" (sources and targets) or "image".
        train, valid: files, folders, or "stdlib" (Python's own sources); without `valid` the last part of
            `train` is held out. Images: FILE.npz:NAME, FILE.npy, pictures, or folders of these.
        holdout: that part, as a share.
        fields: keys of JSONL lines: (text,), (label, text) or (source, target); () is those names.
        tokenizer: {"name": "bytes"}, {"name": "bpe", "vocab": 8192} or {"name": "folder", "path": ...}.
        length: tokens of a row at most.
        batch: rows of one optimiser step, over all processes and pieces.
    """

    kind: str = "text"
    train: tuple[str, ...] = ("stdlib",)
    valid: tuple[str, ...] = ()
    holdout: float = 0.05
    fields: tuple[str, ...] = ()
    tokenizer: Spec = field(default_factory=lambda: {"name": "bytes"})
    length: int = 256
    batch: int = 16

    def __post_init__(self) -> None:
        check_choice("data.kind", self.kind, KINDS)
        if not self.train:
            raise ValueError("data.train is empty; give files, folders or 'stdlib'")
        if not 0 < self.holdout < 1:
            raise ValueError(f"data.holdout={self.holdout} must be a share between 0 and 1, such as 0.05")
        at_least("data", self, length=1, batch=1)
        if self.kind == "image":
            for name in NOT_OF_IMAGES:
                if getattr(self, name) != getattr(DataConfig(), name):
                    raise ValueError(f"data.{name} is not for images, whose size and levels are model.pixels")
        wanted = 1 if self.kind in ("text", "masked") else 2
        if self.fields and len(self.fields) != wanted:
            raise ValueError(f"data.fields must name {wanted} of each line; got {list(self.fields)}")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is left out of texts for an encoder to guess; for data.kind "masked" only.

    Attributes:
        words: share of the words that are guessed.
        summaries: summary tokens before each row, one a sentence, that own its tokens; 0 is none.
        sentences: share of the sentences that are hidden, to be told apart by their summaries (cpc_loss).
        sentence: tokens of a sentence at most; longer ones are cut.
    """

    words: float = 0.15
    summaries: int = 0
    sentences: float = 0.0
    sentence: int = 64

    def __post_init__(self) -> None:
        at_least("masks", self, summaries=0, sentence=1)
        if not 0 < self.words <= 1 or not 0 <= self.sentences < 1:
            raise ValueError(
                f"masks.words={self.words} must be above 0 and at most 1, masks.sentences={self.sentences} "
                "from 0 up to 1"
            )
        if self.sentences and not self.summaries:
            raise ValueError(
                f"masks.sentences={self.sentences} hides sentences of which summaries tell: set "
                "masks.summaries above 0"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised beside the negative log-likelihood.

    Attributes:
        label_smoothing: share of the target's probability given to all tokens alike.
        z_loss: weight of the squared log of the softmax's sum.
        chunk: at most so many tokens of a row have their logits at once; 0 is as many as are fast.
        aux: weights of the auxiliary losses that mixers and layers report, by name; 1 where not given.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0
    aux: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be from 0 up to 1")
        at_least("loss", self, z_loss=0, chunk=0)
        for name, weight in self.aux.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"loss.aux.{name} must be a number; got {weight!r}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move.

    Attributes:
        name: "adamw" or "adafactor".
        lr: the highest learning rate.
        betas, eps: of adamw only.
        weight_decay: of matrices; norms and biases have none.
        schedule: after the warm-up: "cosine", "linear", "inverse_sqrt" or "constant".
        warmup: steps over which the rate rises from 0.
        final: the rate at the last step, as a share of `lr` (cosine and linear).
    """

    name: str = "adamw"
    lr: float = 2e-3
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: int = 50
    final: float = 0.1

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMISERS)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        at_least("optim", self, lr=0, weight_decay=0, warmup=0)
        if not 0 <= self.final <= 1:
            raise ValueError(f"optim.final={self.final} must be a share from 0 to 1")
        if self.name != "adamw" and (self.betas, self.eps) != (None, None):
            raise ValueError(f"optim.betas and optim.eps belong to adamw; got name={self.name!r}")
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)):
            raise ValueError(f"optim.betas={list(self.betas)} must be two numbers from 0 up to 1")
        if self.eps is not None:
            at_least("optim", self, eps=0)
        if self.schedule == "inverse_sqrt" and self.warmup < 1:
            raise ValueError("optim.schedule='inverse_sqrt' needs optim.warmup of at least 1; got 0")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How steps are made.

    Attributes:
        steps: optimiser steps in all.
        accumulate: pieces into which each process divides its rows, to save memory.
        clip: largest norm of the gradient; 0 is off.
        precision: "float32", or "bfloat16" for autocast.
        recompute: keep the inputs of layers only and compute the rest again in the backward pass.
        compile: let inductor compile feed-forward layers and projections.
        carry_state: rows read consecutive segments, the mixers' states passed on without gradient.
        strategy: with several processes: "ddp" or "fsdp".
    """

    steps: int = 500
    accumulate: int = 1
    clip: float = 1.0
    precision: str = "float32"
    recompute: bool = False
    compile: bool = False
    carry_state: bool = False
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        at_least("loop", self, steps=1, accumulate=1, clip=0)
        check_choice("loop.precision", self.precision, ("float32", "bfloat16"))
        check_choice("loop.strategy", self.strategy, ("ddp", "fsdp"))


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is said and kept; none of it changes the weights.

    Attributes:
        log_every, eval_every, save_every: steps between lines, evaluations and checkpoints; 0 is never
            (the last step always does all three).
        eval_batches: batches of an evaluation at most.
        keep: checkpoints kept, newest first.
        tensorboard: also write TensorBoard files (needs the package tensorboard).
        sample: a text that every evaluation continues; None is off, and only decoders of text do it.
        sample_tokens: tokens of the continuation.
    """

    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    eval_batches: int = 20
    keep: int = 3
    tensorboard: bool = False
    sample: str | None = "def "
    sample_tokens: int = 80

    def __post_init__(self) -> None:
        at_least("report", self, log_every=1, eval_every=0, save_every=0, eval_batches=1, keep=1)
        at_least("report", self, sample_tokens=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run; `model` is a model config without `vocab`, which the tokenizer gives."""

    seed: int = 0
    model: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_MODEL))
    data: DataConfig = field(default_factory=DataConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        kind = self.model.get("kind", "decoder")
        if self.loss.chunk and self.data.kind == "labelled":
            raise ValueError(
                f"loss.chunk={self.loss.chunk} is for text and translations; classes have few logits: use 0"
            )
        if kind not in KINDS[self.data.kind]:
            raise ValueError(
                f"data.kind={self.data.kind!r} trains a model of kind {' or '.join(KINDS[self.data.kind])}; "
                f"got model.kind={kind!r}"
            )
        if self.data.kind != "masked" and self.masks != MaskConfig():
            raise ValueError(f"masks are for data.kind='masked'; got {self.data.kind!r}")
        if (self.data.kind == "image") != (self.model.get("pixels") is not None):
            raise ValueError(
                "data.kind='image' and model.pixels need each other: a model of images, and images"
            )
        if self.data.kind == "image" and self.loss.label_smoothing:
            raise ValueError("loss.label_smoothing is not for images: their levels are no classes")
        if self.loop.carry_state and self.data.kind != "text":
            raise ValueError(f"loop.carry_state is for data.kind='text'; got {self.data.kind!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be a whole number from 0 to {2**32 - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out."""
        return plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The run that plain values describe.

        Raises:
            ValueError: an unknown key (with the nearest), or a value that is refused.
        """
        return section(cls, "", values)
