"""A module beside another that has its weights and nothing else: not its hooks, nor what was wrapped around it."""

from __future__ import annotations

import copy

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of accelerate and of torch.compile, on an instance.
_WRAPPED = ("forward", "_hf_hook", "_old_forward")


def in_float32(module: nn.Module) -> nn.Module:
    """Return a twin of a module that computes in float32; it shares what is in float32 already.

    Weights that are no plain floating point numbers stay as they are.
    """
    twin = copy.copy(module)
    own = {name: value for name, value in module.__dict__.items() if name not in _WRAPPED}
    own |= {name: type(module.__dict__[name])() for name in _HOOKS}
    for name in ("_parameters", "_buffers"):
        own[name] = {key: _wide(value) for key, value in module.__dict__[name].items()}
    own["_modules"] = {key: None if one is None else in_float32(one) for key, one in module._modules.items()}
    twin.__dict__ = own | {"_compiled_call_impl": None}
    return twin


def _wide(value: Tensor | None) -> Tensor | None:
    plain = value is not None and value.is_floating_point() and value.element_size() > 1
    return value.detach().float() if plain and value is not None else value
