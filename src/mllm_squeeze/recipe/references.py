"""`${name}` in a recipe: which names it refers to, and the values in their place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mllm_squeeze.errors import ConfigError

MISSING = "???"
_REFERENCE = re.compile(r"\$\{\s*([^{}]*?)\s*\}")


def names(node: Any) -> list[str]:
    """Return the names that a recipe, or a piece of one, refers to, in order."""
    if isinstance(node, str):
        return _REFERENCE.findall(node)
    if isinstance(node, Mapping):
        node = list(node.values())
    return [name for item in node for name in names(item)] if isinstance(node, list) else []


def fill_in(node: Any, values: Mapping[str, Any], where: str, inside: tuple[str, ...] = ()) -> Any:
    """Return a copy of `node` with every reference replaced by the value of its name.

    A text that is one reference becomes the value, of its own type; elsewhere in a text the value is written out.
    inside: the names that are being filled in.

    Raises:
        ConfigError: a name is unknown, or refers to itself.
    """
    if isinstance(node, Mapping):
        return {key: fill_in(item, values, where, inside) for key, item in node.items()}
    if isinstance(node, list):
        return [fill_in(item, values, where, inside) for item in node]
    if not isinstance(node, str):
        return node
    whole = _REFERENCE.fullmatch(node)
    if whole:
        return _value(whole[1], values, where, inside)
    return _REFERENCE.sub(lambda found: str(_value(found[1], values, where, inside)), node)


def _value(name: str, values: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Any:
    if name in inside:
        raise ConfigError(f"{where}: ${{{name}}} refers to itself.")
    if name not in values:
        raise ConfigError(f"{where}: ${{{name}}} is not one of its params: {', '.join(values)}.")
    return fill_in(values[name], values, where, (*inside, name))
