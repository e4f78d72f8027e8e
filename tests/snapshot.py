"""Everything about a model and about transformers that a squeeze may touch while it runs and must put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
# What transformers itself stores on modules: the offset of the last prompt, and that its capture hooks are in place.
_OWN_STATE = {"rope_deltas", "_output_capturing_hooks_installed"}


def _freeze(value: Any) -> Any:
    """Return containers as lists of (key, value); other values as they are, to be compared by identity."""
    if isinstance(value, Mapping):
        items = [(k, v) for k, v in value.items() if not _captures(v)]
        return [(k, _freeze(v) if isinstance(v, (Mapping, list, set)) else v) for k, v in items]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, set):
        return sorted(value, key=repr)
    return value


def _captures(value: Any) -> bool:
    """Say whether this is a hook by which transformers records hidden states, which it installs at the first use."""
    return getattr(value, "__module__", None) == "transformers.utils.output_capturing"


def _module(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {k: _freeze(v) for k, v in vars(module).items() if k not in _OWN_STATE}
    for name, weight in module._parameters.items():
        state[f"version of {name}"] = None if weight is None else weight._version
    return state


def _config(config: Any) -> dict[str, Any]:
    nested = transformers.PretrainedConfig
    return {k: v if isinstance(v, nested) else repr(copy.deepcopy(v)) for k, v in vars(config).items()}


def _tables() -> dict[str, Any]:
    hooks = {k: _freeze(v) for k, v in vars(nn.modules.module).items() if k.startswith("_global_") and "hooks" in k}
    for name, table in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        hooks[f"{name} table, global"] = dict(type(table)._global_mapping)
        hooks[f"{name} table, local"] = dict(table._local_mapping)
    return {k: _freeze(v) for k, v in hooks.items()}


def snapshot(model: Any) -> dict[str, dict[str, Any]]:
    """Return what must be the same again: modules, configs, classes, transformers' tables and torch's global hooks."""
    out: dict[str, dict[str, Any]] = {"tables": _tables()}
    classes = {DynamicCache, DynamicLayer}
    for name, module in model.named_modules():
        out[f"module {name or '(top)'}"] = _module(module)
        classes |= {c for c in type(module).__mro__ if c.__module__.startswith("transformers")}
        config = getattr(module, "config", None)
        if isinstance(config, transformers.PretrainedConfig):
            out[f"config of {name or '(top)'}"] = _config(config)
    if getattr(model, "generation_config", None) is not None:
        out["generation config"] = {"values": repr(model.generation_config.to_dict())}
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        out[f"class {cls.__module__}.{cls.__qualname__}"] = {k: v for k, v in vars(cls).items() if callable(v)}
    return out


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a is b or (isinstance(a, _PLAIN) and type(a) is type(b) and a == b)


def differences(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line per thing that is not as it was."""
    lines = [f"{part}: gone" for part in before if part not in after]
    lines += [f"{part}: new" for part in after if part not in before]
    for part in before.keys() & after.keys():
        old, new = before[part], after[part]
        lines += [f"{part}: attribute {k} gone" for k in old if k not in new]
        lines += [f"{part}: attribute {k} new" for k in new if k not in old]
        lines += [
            f"{part}.{k}: {old[k]!r:.120} became {new[k]!r:.120}" for k in old if k in new and not _same(old[k], new[k])
        ]
    return sorted(lines)


def assert_same(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> None:
    """Fail with the list of what is not as it was."""
    lines = differences(before, after)
    assert not lines, "\n".join(["not as before:", *lines])
