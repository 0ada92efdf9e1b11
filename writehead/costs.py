"""What a model costs, before it runs: parameters, operations, bytes held and bytes moved.

For one layer, B rows and a step behind S cached tokens, with H query and G key/value heads of width D:

    weight bytes   s (H D X + 2 G D X + H D X + feed-forward)     read once for the whole batch
    state read     s B G S 2 D                                     grows with S
    state written  s B G 2 D
    operations     2 B (weights) + 2 B H (S + 1) 2 D

No step is faster than the larger of bytes / bandwidth and operations / rate. Every part states its own
formula (`core/work.py`). A model may be real or a `skeleton`, which has shapes and no memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from writehead.catalog import FEEDFORWARDS, argument
from writehead.config import ModelConfig
from writehead.core.work import Call, Work, values
from writehead.mixers.cross import Cross
from writehead.model.blank import blank
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.parts import Embedding
from writehead.model.seq2seq import Seq2Seq
from writehead.positions.base import Scheme, has

Model = Decoder | Encoder | Seq2Seq


class Costed(Protocol):
    """A mixer or feed-forward layer that states its work."""

    def work(self, call: Call) -> Work:
        """What the call takes of this part."""


@dataclass(frozen=True)
class Costs:
    """One call of a model.

    Attributes:
        flops: operations.
        weight_bytes, state_read, state_written: bytes moved at least.
        state_bytes: bytes that the state holds after the call.
    """

    flops: int
    weight_bytes: int
    state_read: int
    state_written: int
    state_bytes: int

    @property
    def moved(self) -> int:
        """All bytes that the call moves at least."""
        return self.weight_bytes + self.state_read + self.state_written

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The least time of the call.

        Args:
            bandwidth: bytes per second.
            rate: operations per second.

        Raises:
            ValueError: a figure that is not above 0.
        """
        if not (bandwidth > 0 and rate > 0):
            raise ValueError(f"bandwidth={bandwidth} and rate={rate} must both be above 0")
        return max(self.moved / bandwidth, self.flops / rate)


def skeleton(config: ModelConfig) -> Model:
    """The config's model with shapes but without memory.

    Raises:
        ValueError: a config whose parts do not fit together.
    """
    return cast(Model, blank(config))


def parameters(model: Model) -> int:
    """Parameters, shared ones once."""
    return values(model)


def costs(model: Model, call: Call) -> Costs:
    """What one call of a model takes, of a seq2seq model one of its decoder (`read_costs`: its encoder's).

    Args:
        model: a built model, on any device, or a `skeleton`.
        call: its batch, tokens and context. An encoder has no context.

    Raises:
        ValueError: an encoder with a context, or a cross-attention without a source.
    """
    if isinstance(model, Encoder) and call.context:
        raise ValueError(f"an encoder reads whole sequences: context={call.context} must be 0")
    if isinstance(model, Seq2Seq):
        model = model.decoder
    if not call.source and any(block.cross is not None for block in _blocks(model)):
        raise ValueError(
            "a decoder that reads an encoder needs its source's length; source=0, not at least 1"
        )
    total = sum((_block_work(block, call) for block in _blocks(model)), _around(model, call))
    if isinstance(model, Encoder):
        total = replace(total, state_read=0, state_written=0)
    held = 0 if isinstance(model, Encoder) else state_bytes(model, call)
    return Costs(total.flops, total.weights * call.itemsize, total.state_read, total.state_written, held)


def read_costs(model: Seq2Seq, call: Call) -> Costs:
    """What it takes to encode `call.source` tokens in each row and project them for each cross-attention."""
    whole = replace(call, tokens=call.source, context=0)
    own = costs(model.encoder, whole)
    kept = sum((cast(Cross, b.cross).remember_work(call) for b in _blocks(model.decoder)), Work())
    written = kept.state_written
    weight_bytes = own.weight_bytes + kept.weights * call.itemsize
    return Costs(own.flops + kept.flops, weight_bytes, 0, written, written)


def state_bytes(model: Decoder | Seq2Seq, call: Call) -> int:
    """Bytes of the decode state after the call, exactly those of its tensors."""
    decoder = model.decoder if isinstance(model, Seq2Seq) else model
    context = call.context + call.tokens
    total = 8 * call.batch  # the position of each row's next token
    total += decoder.stack.state_bytes(call.batch, context, call.itemsize, call.store)  # type: ignore[operator]
    crosses = (cast(Cross, block.cross) for block in _blocks(decoder) if block.cross is not None)
    return int(total + sum(cross.memory_bytes(call) for cross in crosses))


def match_ffn_width(config: ModelConfig, like: ModelConfig) -> int:
    """The feed-forward width that gives `config` as many parameters as `like` has, to the nearest.

    This is how Shazeer 2019 compares: what fewer key/value heads save goes into wider feed-forward layers.

    Args:
        config: the model to widen, encoder included; all its feed-forward layers get one width.
        like: the model to match.

    Raises:
        ValueError: a feed-forward layer without a width, or no width of at least 1 that matches.
    """
    narrow, wide = (parameters(skeleton(_with_width(config, width))) for width in (1, 2))
    width = 1 + round((parameters(skeleton(like)) - narrow) / (wide - narrow))
    if width < 1:
        raise ValueError(
            f"with feed-forward layers of width 1 the model has {narrow} parameters, already more than the "
            f"{parameters(skeleton(like))} to match"
        )
    return width


def _with_width(config: ModelConfig, width: int) -> ModelConfig:
    specs = config.feedforward if isinstance(config.feedforward, tuple) else (config.feedforward,)
    for spec in specs:
        if "hidden" not in spec and argument(FEEDFORWARDS, spec, "activation") is None:
            raise ValueError(f"feed-forward layer {spec['name']!r} has no width `hidden` to match with")
    encoder = None if config.encoder is None else _with_width(config.encoder, width)
    return replace(config, feedforward=tuple({**s, "hidden": width} for s in specs), encoder=encoder)


def _blocks(model: Decoder | Encoder) -> Iterator[Any]:
    yield from cast(Any, model.stack).blocks


def _block_work(block: Any, call: Call) -> Work:
    parts = [part for part in (block.mixer, block.cross, block.feedforward) if part is not None]
    inside = values(*parts)
    return sum((cast(Costed, part).work(call) for part in parts), Work(weights=values(block) - inside))


def _around(model: Decoder | Encoder, call: Call) -> Work:
    """Embeddings, positions, the last norm and the output matrix."""
    own: Embedding = model.embedding
    V, X = own.table.shape
    lookup = min(call.rows, V) * X
    weights = _position_values(own.position, call) + (0 if own.norm is None else values(own.norm))
    weights += values(model.stack) - values(*_blocks(model))
    weights += 0 if own.types is None else min(call.rows * X, own.types.numel())
    if isinstance(model, Encoder):
        return Work(weights=weights + lookup)
    head = V * X if own.output is None else own.output.numel()
    weights += head + (0 if own.output is None else lookup) + (0 if own.bias is None else V)
    flops = head
    if own.transform is not None:
        weights += values(own.transform)
        flops += own.transform.inner.weight.numel()
    return Work(flops=2 * call.asked * flops, weights=weights)


def _position_values(scheme: Scheme, call: Call) -> int:
    """Position vectors are looked up, a bias table is read whole."""
    whole = values(scheme)
    if not whole or not has(scheme, "embed"):
        return whole
    width = sum(p.shape[-1] for p in scheme.parameters())
    return min(whole, call.rows * width)
