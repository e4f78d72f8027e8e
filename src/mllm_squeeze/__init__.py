"""Training-free pruning and merging of visual tokens for any HuggingFace multimodal LLM.

Importing the package loads neither torch nor transformers and changes nothing anywhere; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_squeeze.api import applied, apply, check, families, remove
    from mllm_squeeze.choosing import Choice, choose
    from mllm_squeeze.engine.text_encoder import TextEncoder
    from mllm_squeeze.engine.trace import Cut
    from mllm_squeeze.errors import (
        AlreadyAppliedError,
        ConfigError,
        InUseError,
        NotAppliedError,
        SqueezeError,
        SqueezeWarning,
        UnknownNameError,
        UnsupportedInputError,
        UnsupportedModelError,
    )
    from mllm_squeeze.handle import Handle
    from mllm_squeeze.recipe.recipe import describe, register_method
    from mllm_squeeze.registry import method_names as methods
    from mllm_squeeze.registry import (
        register_part,
        register_reducer,
        unregister_method,
        unregister_part,
        unregister_reducer,
    )

__version__ = "0.1.0"

_HOMES = {
    "apply": "api",
    "applied": "api",
    "remove": "api",
    "check": "api",
    "families": "api",
    "choose": "choosing",
    "Choice": "choosing",
    "Handle": "handle",
    "methods": "registry",
    "describe": "recipe.recipe",
    "Cut": "engine.trace",
    "TextEncoder": "engine.text_encoder",
    "SqueezeError": "errors",
    "ConfigError": "errors",
    "UnknownNameError": "errors",
    "UnsupportedModelError": "errors",
    "UnsupportedInputError": "errors",
    "AlreadyAppliedError": "errors",
    "NotAppliedError": "errors",
    "InUseError": "errors",
    "SqueezeWarning": "errors",
    "register_method": "recipe.recipe",
    "register_part": "registry",
    "register_reducer": "registry",
    "unregister_method": "registry",
    "unregister_part": "registry",
    "unregister_reducer": "registry",
}

_RENAMED = {"methods": "method_names"}

__all__ = [
    "AlreadyAppliedError",
    "Choice",
    "ConfigError",
    "Cut",
    "Handle",
    "InUseError",
    "NotAppliedError",
    "SqueezeError",
    "SqueezeWarning",
    "TextEncoder",
    "UnknownNameError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "applied",
    "apply",
    "check",
    "choose",
    "describe",
    "families",
    "methods",
    "register_method",
    "register_part",
    "register_reducer",
    "remove",
    "unregister_method",
    "unregister_part",
    "unregister_reducer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mllm_squeeze' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mllm_squeeze.{_HOMES[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
