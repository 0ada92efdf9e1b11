"""Models without memory, and how weights get into them: models of any size cost nothing until filled."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from writehead.config import ModelConfig
from writehead.model.decoder import Decoder
from writehead.model.encoder import Encoder
from writehead.model.seq2seq import Seq2Seq

KINDS: Mapping[str, type[nn.Module]] = {"decoder": Decoder, "encoder": Encoder, "seq2seq": Seq2Seq}

RANDOM = (Tensor.normal_, Tensor.uniform_)


class _Unfilled(TorchFunctionMode):
    """Skips random initialisation: without memory it has no effect, and it would import torch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM or getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def blank(config: ModelConfig) -> nn.Module:
    """The model of a config with weights that have shapes but no memory (torch's meta device).

    Raises:
        ValueError: a config whose parts do not fit together, values of wrong types, or sizes that no
            memory could hold.
    """
    try:
        with torch.device("meta"), _Unfilled():
            return KINDS[config.kind](config)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(
            f"the config's sizes are too large to compute with: {str(error).splitlines()[0]}"
        ) from error
    except (TypeError, AttributeError, KeyError) as error:  # nested values, whose types no signature states
        raise ValueError(f"the config has a value of a wrong type: {error}") from error


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
