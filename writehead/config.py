"""A model, fully described: strict values, to and from JSON and YAML."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from writehead.catalog import Spec
from writehead.core.shapes import check_choice

VERSION = 1
KINDS = ("decoder", "encoder", "seq2seq")
INITS = ("parts", "sparse", "axial")
MOST = {"vocab": 1 << 31, "dim": 1 << 20, "depth": 1 << 13}  # far beyond any model: more is a mistake


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder, an encoder, or both.

    Attributes:
        kind: "decoder", "encoder" or "seq2seq" (a decoder that reads an encoder).
        vocab, dim, depth: tokens, width X, layers.
        mixer, feedforward: a spec, or several that tile over depth.
        position, stack: specs.
        cross: a spec for the cross-attention of a seq2seq model.
        encoder: its encoder.
        tie_embeddings: the output matrix is the embedding table.
        embed_scale, embed_norm: a factor on the token embeddings; a LayerNorm after them.
        embed_norm_last: that LayerNorm comes after positions and types are added, with the stack's eps.
        token_types: rows of a table of token types, added to the embeddings; 0 = no table.
        head_transform: the activation of a dense layer and a LayerNorm before the output matrix.
        logit_scale, head_bias: a factor on the last hidden state; a bias on the logits.
        max_context: tokens the model was made for; a statement, enforced where positions end.
        init: how weights begin: "parts", as each part makes its own, or as in the papers of "sparse" and
            "axial".
        pixels: a spec, if a decoder is a model of images: how pixels come in and out in place of tokens.
    """

    vocab: int
    dim: int
    depth: int
    kind: str = "decoder"
    mixer: Spec | tuple[Spec, ...] = field(default_factory=lambda: {"name": "mqa"})
    feedforward: Spec | tuple[Spec, ...] = field(default_factory=lambda: {"name": "dense"})
    position: Spec = field(default_factory=lambda: {"name": "rotary"})
    stack: Spec = field(default_factory=lambda: {"name": "residual"})
    cross: Spec | None = None
    encoder: "ModelConfig | None" = None
    tie_embeddings: bool = True
    embed_scale: float = 1.0
    embed_norm: bool = False
    embed_norm_last: bool = False
    token_types: int = 0
    head_transform: str | None = None
    logit_scale: float = 1.0
    head_bias: bool = False
    max_context: int | None = None
    init: str = "parts"
    pixels: Spec | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in ("vocab", "dim", "depth"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST[name]:
                raise ValueError(
                    f"{name}={value!r} must be a whole number of at least 1 and at most {MOST[name]}"
                )
        for name in ("embed_scale", "logit_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")
        if self.embed_norm_last and not self.embed_norm:
            raise ValueError(
                "embed_norm_last=True says where a norm comes, but embed_norm=False leaves it out"
            )
        if not 0 <= self.token_types <= MOST["vocab"]:
            raise ValueError(f"token_types={self.token_types} must be from 0 to {MOST['vocab']}")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"max_context={self.max_context} must be at least 1")
        check_choice("init", self.init, INITS)
        if self.init != "parts" and self.kind != "decoder":
            raise ValueError(f"init={self.init!r} is for models of kind 'decoder'; got kind={self.kind!r}")
        if self.pixels is not None:
            self._check_pixels()
        if {self.cross is None, self.encoder is None} != {self.kind != "seq2seq"}:
            raise ValueError(
                f"kind={self.kind!r}: cross and encoder belong to a seq2seq model, which needs both"
            )
        if self.encoder is not None and (self.encoder.kind, self.encoder.dim) != ("encoder", self.dim):
            raise ValueError(
                f"encoder must be of kind 'encoder' and dim={self.dim}; got kind={self.encoder.kind!r}, "
                f"dim={self.encoder.dim}"
            )
        if self.encoder is not None and self.encoder.vocab != self.vocab:
            raise ValueError(
                f"encoder and decoder share their embeddings, so encoder must have vocab={self.vocab}; "
                f"got vocab={self.encoder.vocab}"
            )

    def _check_pixels(self) -> None:
        """Raise where a model of images is asked for what only tokens have."""
        if self.kind != "decoder":
            raise ValueError(f"pixels belong to a model of kind 'decoder'; got kind={self.kind!r}")
        for name in ("embed_scale", "embed_norm", "logit_scale", "head_bias"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)} is for tokens; a model of pixels has none")

    def layer(self, which: str, index: int) -> Spec:
        """The mixer or feedforward spec of one layer."""
        specs = getattr(self, which)
        return specs[index % len(specs)] if isinstance(specs, tuple) else specs  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the format's version; defaults are left out."""
        values = {"writehead": VERSION, **_plain(asdict(self))}
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if values[f.name] == _plain(default):
                del values[f.name]
        if self.encoder is not None:
            values["encoder"] = self.encoder.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config that plain values describe.

        Raises:
            ValueError: an unknown or missing key, a wrong version, or a value that is refused.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config is a mapping of keys to values; got {type(values).__name__}")
        given = dict(values)
        version = given.pop("writehead", VERSION)
        if version != VERSION:
            raise ValueError(
                f"config version {version!r} is not supported; this writehead reads version {VERSION}"
            )
        accepted = {f.name: f for f in fields(cls)}
        for key in given:
            check_choice("config key", str(key), accepted)
        missing = [name for name in ("vocab", "dim", "depth") if name not in given]
        if missing:
            raise ValueError(
                f"config lacks {', '.join(missing)}; got {', '.join(map(str, given)) or 'nothing'}"
            )
        for key in ("mixer", "feedforward"):
            if isinstance(given.get(key), list):
                given[key] = tuple(given[key])
                if not given[key]:
                    raise ValueError(f"{key} is an empty list; give one spec or several that tile over depth")
        for key, value in given.items():
            _check(key, value)
        if isinstance(given.get("encoder"), Mapping):
            given["encoder"] = cls.from_dict(given["encoder"])
        return cls(**given)

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """The config in a JSON or YAML file.

        Raises:
            ValueError: not JSON or YAML, or what `from_dict` refuses; the message names the file.
        """
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
            values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
            return cls.from_dict(values)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is not text; give a config as JSON or YAML") from None
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


def _check(key: str, value: Any) -> None:
    """Raise unless a config value has the type of its key."""
    specs = key in ("mixer", "feedforward", "position", "stack", "cross", "pixels")
    if specs and not (value is None and key in ("cross", "pixels")):
        for spec in value if isinstance(value, tuple) else (value,):
            if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
                raise ValueError(f"{key} must be a spec such as {{'name': ...}}; got {spec!r}")
        return
    kinds: dict[str, tuple[type, ...]] = {
        "embed_scale": (float, int),
        "logit_scale": (float, int),
        "tie_embeddings": (bool,),
        "embed_norm": (bool,),
        "embed_norm_last": (bool,),
        "token_types": (int,),
        "head_transform": (str, type(None)),
        "head_bias": (bool,),
        "max_context": (int, type(None)),
        "kind": (str,),
        "init": (str,),
        "encoder": (Mapping, type(None)),
    }
    accepted = kinds.get(key, (object,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and accepted not in ((bool,), (object,))):
        words = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in accepted)
        raise ValueError(f"{key} must be {words}; got {value!r}")


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, as JSON would give them back."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
