"""Models without memory: models of any size cost nothing until filled."""

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
