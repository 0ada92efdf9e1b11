"""How weights get into models."""

from collections.abc import Mapping

from torch import Tensor, nn


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a blank model its weights, without copying them; a weight that parts share stays shared.

    Args:
        model: from `blank`; changed in place.
        weights: all of `model.parts.weights(model)`, by the same names.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[str, Tensor] = {}
    saved = set(model.state_dict(keep_vars=True))
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, old in own:
            path = f"{prefix}.{name}" if prefix else name
            if path in saved:
                owners.setdefault(id(old), []).append((module, name))
                named[path] = old
    assert weights.keys() <= named.keys(), "weights are parameters and saved buffers"
    for name, tensor in weights.items():
        old = named[name]
        new = nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor
        for module, attribute in owners.pop(id(old)):
            setattr(module, attribute, new)
    assert not owners, "every weight is given"
    return model
