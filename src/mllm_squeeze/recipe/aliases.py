"""Other names of the methods that ship: those that their recipes list, and any spelling of a name."""

from __future__ import annotations

import re
from functools import cache

from mllm_squeeze import registry
from mllm_squeeze.recipe import yaml_text


def method_of(name: str) -> str | None:
    """Return the method that ships which is also called `name`, None where there is none."""
    return _spelled().get(_letters(name))


def _letters(name: str) -> str:
    """Return a name without what people spell in different ways: capitals, dashes, underscores, dots and spaces."""
    return re.sub(r"[-_. ]", "", name.lower())


@cache
def _spelled() -> dict[str, str]:
    """Return each method by the letters of its name and of its aliases; a name goes before an alias of another."""
    files = sorted(registry.configs_dir().glob("*.yaml"))
    names = {_letters(path.stem): path.stem for path in files}
    aliases: dict[str, str] = {}
    for path in files:
        for alias in yaml_text.parse(path.read_text(encoding="utf-8")).get("aliases") or ():
            aliases.setdefault(_letters(alias), path.stem)
    return aliases | names
