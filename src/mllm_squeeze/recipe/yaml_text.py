"""YAML as recipes are written in it: no key twice, and 1e-5 is a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# YAML 1.1 takes 1e-5 for a word, as it has no dot.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class _RecipeLoader(_Loader):  # type: ignore[misc]
    """The safe loader, which takes the last of two equal keys, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; raises ConstructorError for a key that stands there twice."""
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found duplicate key {key_node.value}", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def parse(text: str) -> Any:
    """Return what a YAML text says; raises YAMLError where it is none."""
    return yaml.load(text, _RecipeLoader)


def write(data: Any) -> str:
    """Return the YAML text of plain data, in the order of its keys."""
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
