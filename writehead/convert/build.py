"""How weights get into models."""

from collections.abc import Mapping

from torch import Tensor, nn

from writehead.model.blank import KINDS, blank

__all__ = ["KINDS", "blank", "fill"]


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a blank model its weights, without copying them; a weight that parts share stays shared.

    Args:
        model: from `blank`; changed in place.
        weights: all of `model.parts.weights(model)`, by the same names.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
            named[f"{prefix}.{name}" if prefix else name] = id(parameter)
    assert weights.keys() <= named.keys(), "weights are parameters; no part of a model saves a buffer"
    for name, tensor in weights.items():
        parameter = nn.Parameter(tensor)
        for module, attribute in owners.pop(named[name]):
            setattr(module, attribute, parameter)
    assert not owners, "every weight is given"
    return model
