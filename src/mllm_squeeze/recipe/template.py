"""A recipe before its parameters are filled in: read, override and resolve the `${...}` references."""

from __future__ import annotations

import copy
import json
import numbers
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mllm_squeeze import registry
from mllm_squeeze.amount import ANYWHERE, RATIO_RULE, RULES
from mllm_squeeze.errors import ConfigError, UnknownNameError, did_you_mean
from mllm_squeeze.recipe import aliases, references, variants, yaml_text


def read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
    """Return the plain recipe, the words that name it in messages, and its `source`."""
    if isinstance(source, Mapping):
        where = f"recipe dict '{source.get('method', '?')}'"
        return _plain(source, where), where, "dict"
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"A method is a name, the path of a YAML file or a dict; got {_named(source)}.")
    if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
        return _read_file(Path(source)), str(source), str(source)
    try:
        found = registry.method_source(source)
    except UnknownNameError as error:
        if _is_file(source):
            return _read_file(Path(source)), source, source
        known = aliases.method_of(source)
        if known is not None:
            return read(known)
        raise UnknownNameError(f"{error} A method may also be the path of a recipe file (.yaml) or a dict.") from None
    where = f"method '{source}'"
    return (_plain(found, where) if isinstance(found, Mapping) else _read_file(Path(found))), where, source


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such recipe file (looked in {path.resolve().parent}).")
    try:
        return _plain(json.loads(_parse(path.read_text(encoding="utf-8"))), str(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: this is not a valid YAML recipe: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: an alias stands inside of what it stands for.") from None


# Parsing YAML takes a millisecond. What came out is remembered by what went in, as text on both sides: it is right for
# a file that changed, and nobody can change what the next one gets.
@lru_cache(maxsize=256)
def _parse(text: str) -> str:
    """Return the content of a YAML file as JSON, references unresolved."""
    return json.dumps(_native(yaml_text.parse(text), "the file"))


def _plain(data: Any, where: str) -> dict[str, Any]:
    """Return a deep copy as dicts and lists, references unresolved."""
    out = _native(data, where)
    if not isinstance(out, dict):
        raise ConfigError(f"{where}: a recipe is a mapping with the keys method and steps; got a {type(out).__name__}.")
    return {str(key): value for key, value in out.items()}


def _native(value: Any, where: str, name: str = "") -> Any:
    """Return numpy numbers, tuples, mappings and paths as the plain types that YAML has.

    name: the key that the value stands under. Raises ConfigError where there is no such type.
    """
    if isinstance(value, Mapping):
        return {key: _native(item, where, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_native(item, where, name) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    hint = f" Give the number in it: {name}=....item()." if hasattr(value, "item") else ""
    raise ConfigError(
        f"{where}: {name or 'a recipe'} is {_named(value)}; what a recipe holds are numbers, words, lists and "
        f"mappings.{hint}"
    )


def _named(value: Any) -> str:
    """Return the type of a value, and the value itself where it is short: a module's repr has a line per layer."""
    text = repr(value)
    kind = type(value).__name__
    return f"{text} (of type {kind})" if len(text) <= 60 and "\n" not in text else f"a {kind}"


def check_shape(raw: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Raise ConfigError unless the keys are known, each param is used and `steps` is a list of mappings."""
    for key in raw:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown key '{key}'. {did_you_mean(key, allowed)}")
    params, steps = raw.get("params", {}), raw.get("steps")
    if not isinstance(params, Mapping) or not all(isinstance(k, str) and k.isidentifier() for k in params):
        raise ConfigError(
            f"{where}: params is a mapping of names and default values, like {{ratio: 0.5}}; got {params!r}."
        )
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        raise ConfigError(f"{where}: steps is a list of at least one mapping with reducer and at; got {steps!r}.")
    variants.check_variants(raw, where)
    _check_references(raw, params, where)


def _check_references(raw: Mapping[str, Any], params: Mapping[str, Any], where: str) -> None:
    used = references.names(raw)
    known = [*params, *variants.values_of(raw)]
    for name in used:
        if name not in known:
            raise ConfigError(f"{where}: ${{{name}}} is not one of its params. {did_you_mean(name, known)}")
    if raw.get("variants"):
        used.append(variants.PARAM)
    for name in known:
        if name not in used:
            raise ConfigError(f"{where}: the param '{name}' is not used. Write ${{{name}}} in a step or take it out.")


def override(raw: dict[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the recipe with the user's params in place of its own."""
    params = raw.get("params", {})
    for name in ANYWHERE:
        if name in given and given[name] is None:
            present = [f"{other}: {params[other]}" for other in ANYWHERE if other in params]
            raise ConfigError(
                f"{where}: {name}=None is no budget. Give a number, or leave {name} out to take what the recipe says"
                + (f" ({present[0]})." if present else ".")
            )
    given = {name: _native(value, where, name) for name, value in given.items()}
    budgets = [name for name in RULES if name in given and (name != "kept" or given[name] is not None)]
    if len(budgets) > 1:
        said = " and ".join(f"{name}={given[name]}" for name in budgets)
        raise ConfigError(f"{where}: {said} exclude each other: give one. {RATIO_RULE}")
    out = copy.deepcopy(raw)
    if budgets:
        _budget(out, budgets[0], where)
    for name, value in given.items():
        if name not in out.get("params", {}):
            budgets = list(ANYWHERE) if set(ANYWHERE) & set(params) else []
            raise ConfigError(f"{where}: unknown param '{name}'. {did_you_mean(name, {*params, *budgets})}")
        out["params"][name] = value
    return out


def _budget(raw: dict[str, Any], name: str, where: str) -> None:
    """Make `name` the recipe's budget: a step that refers to another budget param refers to this one instead."""
    params = raw.get("params", {})
    others = [other for other in ANYWHERE if other != name and other in params]
    others = others if name in ANYWHERE and name not in params else []
    for other in others:
        for step in raw["steps"]:
            if references.names(step.get(other)) == [other]:
                del step[other]
                step[name] = f"${{{name}}}"
        del params[other]
        if other in references.names(raw):
            raise ConfigError(f"{where}: it can only be given a {other}, which sets more than the budget of its steps.")
    if others:
        params.setdefault(name, None)
    for step in raw["steps"]:
        rivals = [rival for rival in RULES if rival != name and references.names(step.get(rival)) == [rival]]
        if references.names(step.get(name)) == [name]:
            for rival in rivals:
                # What the user asks for stands in place of the recipe's default.
                del step[rival]
    for rival in set(params) & set(RULES) - {name} - set(references.names(raw)):
        del params[rival]


def required(raw: Mapping[str, Any]) -> list[str]:
    """Return the params that have no default and were given no value."""
    return [name for name, value in raw.get("params", {}).items() if value == references.MISSING]


def resolve(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the recipe with every reference replaced by the typed value of its param."""
    missing = required(raw)
    if missing:
        raise ConfigError(f"{where}: the param {' and '.join(missing)} has no default; give a value.")
    params = raw.get("params", {})
    values = {**params, **variants.chosen(raw, where)}
    plain: dict[str, Any] = references.fill_in({**raw, "params": params}, values, where)
    return plain
