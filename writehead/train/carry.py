"""States that rows carry from segment to segment: started, kept in checkpoints, and made again from them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from writehead.core.state import State, apply
from writehead.model.decoder import Decoder

NEAR, FAR = 1 << 12, 1 << 16  # contexts at which a state that does not grow is as large


def check_bounded(model: Decoder) -> None:
    """Raise unless every layer's state has a size of its own, whatever the context.

    Raises:
        ValueError: a state that grows, which a run over a long text cannot carry.
    """
    for index, block in enumerate(model.blocks):
        sizes = [block.mixer.state_bytes(1, context, 4) for context in (NEAR, FAR)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"loop.carry_state needs states that do not grow; layer {index}'s grows with the text: give "
                "its mixer a window (such as local_mqa), or a memory"
            )


def kept(states: list[State]) -> dict[str, Tensor]:
    """The tensors of states, in the order in which `remade` wants them."""
    found: dict[str, Tensor] = {}

    def keep(number: int, tensor: Tensor) -> Tensor:
        found[f"{number}:{len(found)}"] = tensor
        return tensor

    for number, state in enumerate(states):
        apply(state, lambda tensor, number=number: keep(number, tensor))  # type: ignore[misc]
    return found


def remade(
    model: Decoder, tensors: Mapping[str, Tensor], rows: int, length: int, segments: int
) -> list[State]:
    """The states that `kept` took apart.

    A state's structure (how full a ring is, say) follows from how many segments it has seen, so segments of
    nothing in particular are read until it is full, and then its tensors are replaced.

    Args:
        model: what made the states.
        tensors: what `kept` gave.
        rows: of each state.
        length: tokens of a segment.
        segments: how many the states had seen.

    Raises:
        ValueError: tensors of other shapes than the model makes.
    """
    if not tensors:
        return []
    longest = max(max(t.shape, default=1) for t in tensors.values())
    blank = torch.zeros(rows, length, dtype=torch.int64, device=model.embedding.table.device)
    groups: dict[int, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda n: [int(part) for part in n.split(":")]):
        groups.setdefault(int(name.partition(":")[0]), []).append(tensors[name])
    states = []
    for group in groups.values():
        state: State = model.init_state(rows)
        with torch.no_grad():
            for _ in range(min(segments, 2 + 16 * longest // length)):
                state = model.hidden(blank, state)[1]
        rest = iter(group)
        states.append(apply(state, lambda old, rest=rest: _replaced(old, next(rest, None))))  # type: ignore[misc]
        if next(rest, None) is not None:
            raise ValueError("the carried state has more tensors than the model makes")
    return states


def _replaced(old: Tensor, new: Tensor | None) -> Tensor:
    if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
        there = "nothing" if new is None else f"{tuple(new.shape)} {new.dtype}"
        raise ValueError(
            f"the carried state has {there} where the model makes {tuple(old.shape)} {old.dtype}"
        )
    return new.to(old.device)
