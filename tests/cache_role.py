"""The cache by its role: since transformers 5.24 it is `cache` wherever it was `past_key_values`; imports no engine.

One release has one name in all forwards, in generate() and in all outputs, and warns of the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import LlamaForCausalLM

NAMES = ("cache", "past_key_values")


def cache_argument(module: Any) -> str | None:
    """Return what the forward of a module, or of a class of modules, calls its cache; None where it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


NAME = cache_argument(LlamaForCausalLM) or "no name that tests/cache_role.py knows"


def given(cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to a forward or to generate(): `model(..., **given(cache))`."""
    return {NAME: cache}


def of_call(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments that a hook sees: the caller may have written either name."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def of_output(output: Any) -> Any:
    """Return the cache of what a forward or generate() returned."""
    name = next(name for name in NAMES if name in {field.name for field in fields(output)})
    return getattr(output, name)


def behind(output: Any) -> dict[str, Any]:
    """Return the keyword argument for a call that goes on behind an earlier output: `model(..., **behind(out))`."""
    return given(of_output(output))
