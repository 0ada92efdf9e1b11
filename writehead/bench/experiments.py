"""The experiments that check what papers say: each is a list of pieces, each piece a training run.

One write-head (Shazeer 2019) on translation (its Table 1) and language modelling (its Table 3), and ALiBi
(Press et al. 2021): small models, the papers' variants, everything else equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from writehead.config import ModelConfig
from writehead.core.shapes import check_choice
from writehead.costs import match_ffn_width
from writehead.train.config import RunConfig

WIKITEXT, MULTI30K = "wikitext2.{}.txt.gz", "multi30k.en-de.{}.tsv.gz"
TESTED = "test_2016_flickr"
# query heads, key/value heads, and what part of dim a head is wide (shrunk ones are 1/8 in all)
HEADS: Mapping[str, tuple[int, int, int]] = {
    "multi-head": (8, 8, 8),
    "multi-query": (8, 1, 8),
    "1 head": (1, 1, 8),
    "2 heads": (2, 2, 16),
    "4 heads": (4, 4, 32),
    "8 thin heads": (8, 8, 64),
}
LOCAL = {"multi-head local": "multi-head", "multi-query local": "multi-query"}
ACROSS = {"multi-query, all heads across": "multi-query"}  # the decoder reads its source as multi-head does
TRANSLATORS = (*list(HEADS)[:2], *LOCAL, *list(HEADS)[2:], *ACROSS)
WINDOW = 8  # tokens that local variants see: half of a mean sentence (the paper: 32)
POSITIONS = ("sinusoidal", "learned", "rotary", "t5", "alibi")
LENGTH, LONGER = 64, (1, 2, 4, 8, 16)  # tokens of training rows; lengths of evaluation, in these


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        dim, depth: of its models, a translation model's encoder and decoder each.
        steps, batch: of its runs.
        vocab: of its tokenizer.
        tokens: held-out tokens that are scored, of translations sentences.
        seeds: of each variant.
    """

    dim: int = 128
    depth: int = 4
    steps: int = 1200
    batch: int = 32
    vocab: int = 2048
    tokens: int = 16384
    seeds: int = 3


SCALES: Mapping[str, Scale] = {
    "translation": Scale(depth=2, steps=2700, batch=64, vocab=3000, tokens=1000, seeds=1),
    "lm": Scale(),
    "alibi": Scale(),
}


@dataclass(frozen=True)
class Piece:
    """One run of an experiment.

    Attributes:
        experiment, variant, seed: which one; together its name.
        run: the whole training run.
        tokens: held-out tokens (sentences of a translation) that are scored at most.
        tested: the files of the scores; () is the run's own held-out part.
    """

    experiment: str
    variant: str
    seed: int
    run: RunConfig
    tokens: int
    tested: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.experiment}, {self.variant}, seed {self.seed}"

    @property
    def key(self) -> list[Any]:
        """What tells it from other pieces, its scale included; folders of data and new options do not."""
        return [self.experiment, self.variant, self.seed, self.tokens, essence(self.run.to_dict())]


def essence(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run differs from the defaults, so that new options change nothing; data files by their names
    alone."""
    base, found = RunConfig().to_dict(), {"model": run["model"]}
    for section, values in run.items():
        if isinstance(values, Mapping) and section != "model":
            differs = {key: one for key, one in values.items() if one != base[section].get(key)}
            found |= {section: differs} if differs else {}
        elif section != "model":
            found[section] = values
    data = dict(found.get("data", {}))
    for part in ("train", "valid"):
        if part in data:
            data[part] = [Path(name).name for name in data[part]]
    return {**found, "data": data}


@dataclass(frozen=True)
class Sources:
    """The data of the experiments.

    Attributes:
        text: the data section of language models.
        parallel: that of translation models, and the file that they are tested on; None where it is missing.
        said: what was found and what was not, for people.
    """

    text: Mapping[str, Any]
    parallel: Mapping[str, Any] | None = None
    tested: str = ""
    said: tuple[str, ...] = ()


def sources(folder: Path | None) -> Sources:
    """What there is: WikiText-2, else Python's own library; Multi30k, else no translation."""

    def there(pattern: str, *parts: str) -> list[str] | None:
        files = [folder / pattern.format(part) for part in parts] if folder else []
        return [str(path) for path in files] if files and all(path.exists() for path in files) else None

    said = []
    text: Mapping[str, Any] = {"train": ["stdlib"]}
    if (files := there(WIKITEXT, "train", "valid")) is not None:
        text = {"train": files[:1], "valid": files[1:]}
        said.append(f"WikiText-2 in {folder}")
    else:
        wanted = ", ".join(WIKITEXT.format(part) for part in ("train", "valid"))
        said.append(
            f"no WikiText-2 in {folder} (wanted: {wanted}, the usual files packed with gzip); the "
            "experiments run on Python's own sources"
        )
    pairs = there(MULTI30K, "train", "val", TESTED)
    if pairs is None:
        wanted = ", ".join(MULTI30K.format(part) for part in ("train", "val", TESTED))
        said.append(
            f"no Multi30k in {folder} (wanted: {wanted}, lines of English, a tab and German, from "
            "github.com/multi30k/dataset); translation is left out"
        )
        return Sources(text, said=tuple(said))
    said.append(f"Multi30k in {folder}")
    return Sources(text, {"train": pairs[:1], "valid": pairs[1:2]}, pairs[2], tuple(said))


def translation_pieces(data: Sources, scale: Scale) -> list[Piece]:
    """One write-head, translation: head sharing, local and shrunk baselines at equal parameters; and, not in
    the paper, where sharing costs."""
    if data.parallel is None:
        return []
    found = []
    for seed in range(scale.seeds):
        for variant in TRANSLATORS:
            mixer = _heads({**LOCAL, **ACROSS}.get(variant, variant), scale)
            cross = _heads("multi-head", scale) if variant in ACROSS else mixer
            model = _widened(_translator(mixer, cross, scale, variant in LOCAL), scale)
            section = {**data.parallel, "kind": "parallel", "length": 100}
            run = _run(model, section, scale, seed, {"loss": {"label_smoothing": 0.1}})
            found.append(Piece("translation", variant, seed, run, scale.tokens, (data.tested,)))
    return found


def lm_pieces(data: Sources, scale: Scale) -> list[Piece]:
    """One write-head, language modelling: head sharing and shrunk baselines at equal parameters."""
    found = []
    for seed in range(scale.seeds):
        for variant in HEADS:
            model = _widened(_model(_heads(variant, scale), scale), scale)
            run = _run(model, {**data.text, "length": 128}, scale, seed)
            found.append(Piece("lm", variant, seed, run, scale.tokens))
    return found


def alibi_pieces(data: Sources, scale: Scale) -> list[Piece]:
    """Train short, test long: position schemes trained at one length and evaluated up to 16 times longer."""
    found = []
    for seed in range(scale.seeds):
        for name in POSITIONS:
            position = {"name": name, **({"max_context": LENGTH * max(LONGER)} if name == "learned" else {})}
            model = _model({"name": "mha", "heads": 8}, scale) | {"position": position}
            run = _run(model, {**data.text, "length": LENGTH}, scale, seed)
            found.append(Piece("alibi", name, seed, run, scale.tokens))
    return found


EXPERIMENTS: Mapping[str, Callable[[Sources, Scale], list[Piece]]] = {
    "translation": translation_pieces,
    "lm": lm_pieces,
    "alibi": alibi_pieces,
}


def pieces(names: Sequence[str], data: Sources, **scale: int) -> list[Piece]:
    """The pieces of experiments, the first seed of all variants before the second of any.

    Args:
        names: of `EXPERIMENTS`.
        data: where to learn from.
        **scale: fields of `Scale` that differ from the experiment's own.

    Raises:
        ValueError: an experiment that is not there.
    """
    for name in names:
        check_choice("experiment", name, EXPERIMENTS)
    found = [piece for name in names for piece in EXPERIMENTS[name](data, replace(SCALES[name], **scale))]
    return sorted(found, key=lambda piece: piece.seed)


def _heads(variant: str, scale: Scale) -> dict[str, Any]:
    heads, kv_heads, share = HEADS[variant]
    return {"name": "mha", "heads": heads, "kv_heads": kv_heads, "head_dim": max(1, scale.dim // share)}


def _model(mixer: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    return {
        "dim": scale.dim,
        "depth": scale.depth,
        "mixer": dict(mixer),
        "feedforward": {"name": "dense", "hidden": 4 * scale.dim, "activation": "relu"},
        "position": {"name": "sinusoidal"},
        "embed_scale": scale.dim**0.5,
    }


def _translator(
    mixer: Mapping[str, Any], cross: Mapping[str, Any], scale: Scale, local: bool
) -> dict[str, Any]:
    """Encoder and decoder alike, but for a local variant's window in the decoder."""
    window = {"pattern": {"name": "window", "window": WINDOW}} if local else {}
    half = {**_model(mixer, scale), "stack": {"name": "residual", "dropout": 0.1}}
    encoder = {**half, "kind": "encoder", "mixer": {**mixer, "name": "bidirectional"}}
    across = {**cross, "name": "cross"}
    return {**half, "kind": "seq2seq", "mixer": {**mixer, **window}, "cross": across, "encoder": encoder}


def _widened(model: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """The model with feed-forward layers that give it the parameters of the multi-head one."""
    seq2seq = "encoder" in model
    heads = _heads("multi-head", scale)
    like = _translator(heads, heads, scale, False) if seq2seq else _model(heads, scale)

    def full(values: Mapping[str, Any]) -> ModelConfig:
        inner = {"encoder": {**values["encoder"], "vocab": scale.vocab}} if seq2seq else {}
        return ModelConfig.from_dict({**values, "vocab": scale.vocab, **inner})

    layer = {**model["feedforward"], "hidden": match_ffn_width(full(model), full(like))}
    inner = {"encoder": {**model["encoder"], "feedforward": layer}} if seq2seq else {}
    return {**model, "feedforward": layer, **inner}


def _run(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    scale: Scale,
    seed: int,
    more: Mapping[str, Any] = {},
) -> RunConfig:
    tokenizer = {"name": "bpe", "vocab": scale.vocab}
    return RunConfig.from_dict(
        {
            "seed": seed,
            "model": dict(model),
            "data": {**data, "tokenizer": tokenizer, "batch": scale.batch},
            "optim": {"lr": 1e-3 if not more else 2e-3, "warmup": min(100, scale.steps // 4)},
            "loop": {"steps": scale.steps},
            "report": {"sample": None, "eval_every": 0, "save_every": 200, "log_every": 50, "keep": 1},
            **more,
        }
    )
