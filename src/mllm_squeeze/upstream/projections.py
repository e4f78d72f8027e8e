"""The projections of an attention module, and whether code of accelerate moves their weights about."""

from __future__ import annotations

from torch import nn

# Projections whose output is needed for the rows that are asked for only, or not at all, where keys are read.
_ROWWISE = ("q_proj", "v_proj")


def rowwise_projections(attention: nn.Module) -> list[nn.Module]:
    """Return the projections of an attention module that can run on one row where only one is asked for."""
    found = (getattr(attention, name, None) for name in _ROWWISE)
    return [module for module in found if isinstance(module, nn.Module)]


def is_offloaded(module: nn.Module) -> bool:
    """True where accelerate moves the weights of a module in and out around each call."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())
