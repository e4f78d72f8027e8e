"""Where a paper and its code disagree, a recipe offers both: one table of values per word of the param `variant`.

```yaml
params: {ratio: 0.889, variant: official}
variants:
  official: {weights: added_mean}
  paper: {weights: mean}
```

Steps refer to the values like to params: `weights: "${weights}"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_squeeze.errors import ConfigError, did_you_mean

PARAM = "variant"


def check_variants(raw: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError unless `variants` has a table of the same names for each word, and `variant` is a param."""
    tables = raw.get("variants")
    if tables is None:
        return
    if not isinstance(tables, Mapping) or not tables or not all(isinstance(t, Mapping) and t for t in tables.values()):
        raise ConfigError(
            f"{where}: variants holds a table of values for each variant, like {{paper: {{weights: mean}}}}; "
            f"got {tables!r}."
        )
    names = {word: sorted(table) for word, table in tables.items()}
    (first, expected), *others = names.items()
    for word, given in others:
        if given != expected:
            raise ConfigError(
                f"{where}: each variant gives values to the same names; '{first}' gives {', '.join(expected)}, "
                f"'{word}' gives {', '.join(given)}."
            )
    params = raw.get("params", {})
    if PARAM not in params:
        raise ConfigError(f"{where}: variants needs the param 'variant', which says which one is taken by default.")
    for name in expected:
        if name in params:
            raise ConfigError(f"{where}: '{name}' is a param and a value of the variants. Rename one of them.")


def values_of(raw: Mapping[str, Any]) -> list[str]:
    """Return the names that the variants give values to."""
    tables = raw.get("variants") or {}
    return list(next(iter(tables.values()), {}))


def chosen(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of the variant that the params name; raises ConfigError where there is no such variant."""
    tables = raw.get("variants")
    if not tables:
        return {}
    word = raw["params"][PARAM]
    if word == "???":  # it has no default; whoever fills in the params says so
        return dict(next(iter(tables.values())))
    if word not in tables:
        raise ConfigError(f"{where}: unknown variant '{word}'. {did_you_mean(str(word), tables)}")
    return dict(tables[word])
