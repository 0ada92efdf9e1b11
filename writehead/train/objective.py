"""The training loss of a model, as a module, so that DDP and FSDP2 wrap its forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from writehead.core.positions import Positions
from writehead.core.replay import contexts
from writehead.core.shapes import check_choice
from writehead.core.state import State
from writehead.mixer import Aux
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.parts import weights
from writehead.model.seq2seq import Seq2Seq
from writehead.ops.chunked_loss import Terms, head_loss, in_pieces, loss_of
from writehead.stacks.residual import merge_aux
from writehead.stacks.reversible import Reversible
from writehead.train.batches import Batch
from writehead.train.config import LossConfig
from writehead.train.masked import contrast

Model = Decoder | Encoder | Seq2Seq


class Sums(NamedTuple):
    """What a piece of a batch gives, summed over its targets.

    Attributes:
        loss: what is minimised.
        nll: negative log-likelihood in nats, without gradient.
        right: targets that were likelier than any other token.
    """

    loss: Tensor
    nll: Tensor
    right: Tensor


class Objective(nn.Module):
    """A model and its loss."""

    def __init__(self, model: Model, loss: LossConfig, choices: Sequence[int] = ()) -> None:
        """Make it; `choices` are the tokens of the classes of labelled texts."""
        super().__init__()
        self.model, self.loss = model, loss
        self.register_buffer("choices", torch.tensor(choices, dtype=torch.int64), persistent=False)

    def forward(self, batch: Batch, state: State = None) -> tuple[Sums, State]:
        """The sums of one piece, and the state after it if one was given."""
        if len(self.choices):  # type: ignore[arg-type]
            x, aux = self._classify(batch)
        elif isinstance(self.model, Encoder):
            return self._guess(self.model, batch), state
        elif isinstance(self.model, Seq2Seq):
            assert batch.source is not None
            x, aux = self.model.whole(batch.source, batch.tokens)
        elif state is None:
            assert isinstance(self.model, Decoder)
            x, aux = self.model.whole(batch.tokens)
        else:
            assert isinstance(self.model, Decoder)
            x, state, aux = self.model.hidden(batch.tokens, state)
        return self._sums(x, batch.target, aux), state

    def _guess(self, model: Encoder, batch: Batch) -> Sums:
        """The sums over masked words, of which alone logits are made, and of the hidden sentences."""
        x, _, aux = model(batch.tokens, owners=batch.owners)
        if batch.alone is not None and batch.asked is not None:
            row, nth = (batch.asked >= 0).nonzero(as_tuple=True)
            told, alone = x[row, batch.asked[row, nth]], batch.alone[row, nth]
            if len(alone):
                owners = torch.where(alone >= 0, 0, -1)
                owners[:, 0] = -1
                y, _, more = model(alone, owners=owners)
                aux = merge_aux(merge_aux(aux, more), {"cpc_loss": contrast(told, y[:, 0])})
            else:
                aux = {**aux, "cpc_loss": contrast(told, told)}
        wanted = batch.target >= 0
        return self._sums(x[wanted][None], batch.target[wanted][None], aux)

    def _classify(self, batch: Batch) -> tuple[Tensor, Aux]:
        """What the classes' rows read, (B, 1, X): an encoder's mean vector, or a decoder's last one."""
        if isinstance(self.model, Encoder):
            x, pos, aux = self.model(batch.tokens)
            valid = pos.valid[..., None].to(x.dtype)
            x = (x * valid).sum(1) / valid.sum(1)
        else:
            assert isinstance(self.model, Decoder)
            x, aux = self.model.whole(batch.tokens)
            x = x[torch.arange(len(x), device=x.device), (batch.tokens >= 0).sum(1) - 1]
        return x[:, None], aux

    def _sums(self, x: Tensor, target: Tensor, aux: Aux) -> Sums:
        """Sums over the targets of cross-entropy and what the config adds to it."""
        half = self.model.decoder if isinstance(self.model, Seq2Seq) else self.model
        terms, chunk = Terms(self.loss.label_smoothing, self.loss.z_loss), self.loss.chunk
        head = getattr(half.embedding, "head", None)
        if head is not None:
            x, weight, bias = head(x)
            if len(self.choices):  # type: ignore[arg-type]
                weight, bias = (None if t is None else t[self.choices] for t in (weight, bias))
            loss, nll, right = head_loss(x, weight, bias, target, terms, chunk)
        else:

            def piece(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return loss_of(half.embedding.logits(part), wanted, terms)

            loss, nll, right = in_pieces(piece, x, target, chunk) if chunk else piece(x, target)
        return Sums(loss + auxiliary(aux, self.loss.aux) * (target >= 0).sum(), nll, right)


def auxiliary(aux: Aux, weights: Mapping[str, float]) -> Tensor | float:
    """The weighted sum of the auxiliary losses: those whose name ends in "loss".

    Raises:
        ValueError: a weight for a loss that the model does not report.
    """
    losses = {name: value for name, value in aux.items() if name.endswith("loss")}
    for name in weights:
        if name not in losses:
            check_choice("auxiliary loss in loss.aux", name, losses)
    return sum((weights.get(name, 1.0) * value.float().mean() for name, value in losses.items()), 0.0)


@torch.no_grad()
def load_into(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into a model.

    Raises:
        ValueError: weights that are missing, too many, or of other shapes.
    """
    own = weights(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"the weights {'lack' if name in own else 'have, and the model lacks,'} {name}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            given = tuple(tensors[name].shape)
            raise ValueError(f"{name} has shape {given}; the model's has {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])


def recompute(model: Model) -> None:
    """Make each layer keep only its inputs for the backward pass, and compute the rest again there.

    A reversible stack does more by itself, and is left as it is.
    """
    halves = [model.encoder, model.decoder] if isinstance(model, Seq2Seq) else [model]
    stacks = [half.stack for half in halves if not isinstance(half.stack, Reversible)]
    for block in (block for stack in stacks for block in cast(Any, stack).blocks):
        for name in ("forward", "encode", "whole"):
            setattr(block, name, _Recomputed(block, getattr(block, name)))


class _Recomputed:
    """A layer's function, computed again in the backward pass.

    Positions are made anew inside, since what layers share through them would be saved by one layer and not
    by its recomputation; what layers hand on beside x goes in and out.
    """

    def __init__(self, block: nn.Module, function: Any) -> None:
        self.block, self.function = block, function

    def __call__(self, x: Tensor, pos: Positions, *state: State) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.function(x, pos, *state)

        def run(x: Tensor, index: Tensor, streams: dict[str, Tensor]) -> Any:
            inside = Positions(index)
            inside.streams.update(streams)
            return self.function(x, inside, *state), inside.streams

        result, streams = checkpoint(
            run, x, pos.index, dict(pos.streams), use_reentrant=False, context_fn=contexts
        )
        pos.streams.update(streams)
        return result
