"""Whether a model computes with quantised numbers, so that what a token gets depends on what runs beside it."""

from __future__ import annotations

from torch import nn

_LIBRARIES = ("quant", "torchao", "bitsandbytes", "gptq", "awq")


def is_quantised(model: nn.Module) -> bool:
    """True where transformers loaded a model quantised, or other code has put quantised modules or weights in it."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return True
    kinds = {type(module) for module in model.modules()} | {type(weight.data) for weight in model.parameters()}
    return any(name in kind.__module__ for kind in kinds for name in _LIBRARIES)
