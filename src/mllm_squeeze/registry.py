"""Methods, reducers and families by name: those that ship, those of other packages, those of this process.

Other packages add theirs through entry points; nothing is imported before its name is asked for, and never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mllm_squeeze import plugins
from mllm_squeeze.errors import ConfigError, UnknownNameError, did_you_mean
from mllm_squeeze.reducers.base import Reducer
from mllm_squeeze.shipped import BUILTIN_PARTS, BUILTIN_REDUCERS

if TYPE_CHECKING:
    from mllm_squeeze.parts.base import Part

Source = str | Path | Mapping[str, Any]

REDUCERS_GROUP = "mllm_squeeze.reducers"
PARTS_GROUP = "mllm_squeeze.parts"
METHODS_GROUP = "mllm_squeeze.methods"
FAMILIES_GROUP = "mllm_squeeze.families"

_own_parts: dict[str, type[Part]] = {}
_own_reducers: dict[str, type[Reducer]] = {}
_own_methods: dict[str, Source] = {}


def register_reducer(name: str, cls: type[Reducer]) -> None:
    """Add a reducer for this process; raises ConfigError where the name is taken or `cls` is no Reducer subclass."""
    _check_reducer(name, cls)
    if _own_reducers.get(name) is not cls:
        _check_free("reducer", name, reducer_names(), "unregister_reducer")
        _own_reducers[name] = cls


def unregister_reducer(name: str) -> None:
    """Take back `register_reducer`; raises UnknownNameError where the name was not registered in this process."""
    _take_back("reducer", name, _own_reducers)


def register_part(name: str, cls: type[Part]) -> None:
    """Add a part for this process.

    name: what recipes call it; names are apart by kind.
    cls: a subclass of one of `Score`, `Segment`, `Budget`, `Select` and `Merge` of `mllm_squeeze.parts.base`.

    Raises:
        ConfigError: the name is taken, or `cls` is no part.
    """
    kind = _kind_of(name, cls)
    if _own_parts.get(f"{kind}.{name}") is not cls:
        _check_free(f"{kind} part", name, part_names(kind), "unregister_part")
        _own_parts[f"{kind}.{name}"] = cls


def unregister_part(kind: str, name: str) -> None:
    """Take back `register_part`; raises UnknownNameError where the name was not registered in this process."""
    _take_back("part", f"{kind}.{name}", _own_parts)


def part_names(kind: str) -> list[str]:
    """Return the names of all parts of a kind, sorted."""
    every = {*BUILTIN_PARTS, *_own_parts, *plugins.points(PARTS_GROUP)}
    return sorted(name.removeprefix(f"{kind}.") for name in every if name.startswith(f"{kind}."))


def part_class(kind: str, name: str) -> type[Part]:
    """Return the class of a part; raises UnknownNameError, or ConfigError where two packages use the name."""
    full = f"{kind}.{name}"
    found: list[tuple[str, Callable[[], Any]]] = []
    if full in BUILTIN_PARTS:
        found.append(("mllm_squeeze", lambda: _import(BUILTIN_PARTS[full])))
    if full in _own_parts:
        found.append(("register_part", lambda: _own_parts[full]))
    found += plugins.from_packages(PARTS_GROUP, full)
    if not found:
        raise UnknownNameError(f"Unknown {kind} '{name}'. {did_you_mean(name, part_names(kind))}")
    cls: type[Part] = _only("part", full, found, lambda: part_names(kind))()
    _kind_of(name, cls, kind)
    return cls


def build_part(kind: str, value: Any) -> Any:
    """Return a part as a recipe writes it: a name, or {name: {parameter: value}}, or {name: value of its main one}.

    Raises:
        ValueError: the name is unknown, or its parameters are not valid.
    """
    from mllm_squeeze.parts.base import Part

    if isinstance(value, Part):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"give one name, or {{name: {{parameter: value}}}}; got {value!r}")
    ((name, given),) = value.items()
    try:
        cls = part_class(kind, str(name))
    except UnknownNameError as error:
        raise ValueError(str(error).strip(".")) from None
    main = cls.main
    return cls(**given) if isinstance(given, Mapping) else cls(**{main: given}) if main else _no_main(name, given, cls)


def _no_main(name: Any, given: Any, cls: type[Part]) -> Any:
    known = ", ".join(cls.model_fields) or "none"
    raise ValueError(f"'{name}' takes {{parameter: value}}; its parameters are: {known}; got {given!r}")


def add_method(name: str, source: Source) -> None:
    """Add a method for this process; raises ConfigError where the name is taken. See `config.register_method`."""
    if name not in _own_methods or _own_methods[name] != source:
        _check_free("method", name, method_names(), "unregister_method")
        _own_methods[name] = source


def unregister_method(name: str) -> None:
    """Take back `config.register_method`; raises UnknownNameError where this process did not register the name."""
    _take_back("method", name, _own_methods)


def reducer_names() -> list[str]:
    """Return the names of all reducers, sorted."""
    return sorted({*BUILTIN_REDUCERS, *_own_reducers, *plugins.points(REDUCERS_GROUP)})


def reducer_class(name: str) -> type[Reducer]:
    """Return the class of a reducer; raises UnknownNameError, or ConfigError where two packages use the name."""
    found: list[tuple[str, Callable[[], Any]]] = []
    if name in BUILTIN_REDUCERS:
        found.append(("mllm_squeeze", lambda: _import(BUILTIN_REDUCERS[name])))
    if name in _own_reducers:
        found.append(("register_reducer", lambda: _own_reducers[name]))
    found += plugins.from_packages(REDUCERS_GROUP, name)
    cls: type[Reducer] = _only("reducer", name, found, reducer_names)()
    _check_reducer(name, cls)
    return cls


def method_names() -> list[str]:
    """Return the names of all methods, sorted."""
    return sorted({*_builtin_methods(), *_own_methods, *plugins.points(METHODS_GROUP)})


def method_source(name: str) -> Source:
    """Return where a method's recipe is: a path or a dict; raises UnknownNameError, or ConfigError on a double name."""
    found: list[tuple[str, Callable[[], Any]]] = []
    builtin = _builtin_methods()
    if name in builtin:
        found.append(("mllm_squeeze", lambda: builtin[name]))
    if name in _own_methods:
        found.append(("register_method", lambda: _own_methods[name]))
    found += plugins.from_packages(METHODS_GROUP, name, plugins.load_method)
    source: Any = _only("method", name, found, method_names)()
    return check_method(name, source)


def family_plugins() -> dict[str, Any]:
    """Return what other packages offer as `mllm_squeeze.families`, loaded, by name; ConfigError on a double name."""
    points = plugins.points(FAMILIES_GROUP)
    return {
        name: _only("family", name, plugins.from_packages(FAMILIES_GROUP, name), lambda: points)() for name in points
    }


def configs_dir() -> Path:
    """Return the folder of the recipes that ship: inside the package when installed, beside `src` in a checkout."""
    packaged = Path(str(files("mllm_squeeze"))) / "configs"
    checkout = Path(__file__).resolve().parents[2] / "configs"
    for folder in (packaged, checkout):
        if folder.is_dir():
            return folder
    raise ConfigError(f"The recipes that ship with mllm_squeeze are missing: neither {packaged} nor {checkout} exists.")


def _builtin_methods() -> dict[str, Path]:
    return {path.stem: path for path in configs_dir().glob("*.yaml")}


def _import(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)


def _only(
    kind: str, name: str, found: list[tuple[str, Callable[[], Any]]], names: Callable[[], Iterable[str]]
) -> Callable[[], Any]:
    if not found:
        raise UnknownNameError(f"Unknown {kind} '{name}'. {did_you_mean(name, names())}")
    if len(found) > 1:
        owners = " and ".join(owner for owner, _ in found)
        raise ConfigError(f"The {kind} name '{name}' is taken twice, by {owners}. Rename or uninstall one of them.")
    return found[0][1]


def _check_free(kind: str, name: str, taken: Iterable[str], undo: str) -> None:
    if name in taken:
        raise ConfigError(f"The {kind} name '{name}' is taken. Choose another, or call squeeze.{undo} if it is yours.")


def _take_back(kind: str, name: str, own: dict[str, Any]) -> None:
    if name not in own:
        raise UnknownNameError(f"No {kind} '{name}' was registered in this process. {did_you_mean(name, own)}")
    del own[name]


def _kind_of(name: str, cls: Any, kind: str | None = None) -> str:
    from mllm_squeeze.parts.base import KINDS, Part

    if not (isinstance(cls, type) and issubclass(cls, Part)) or (kind or cls.kind) not in KINDS:
        raise ConfigError(f"The part '{name}' must subclass a part of mllm_squeeze.parts.base; got {cls!r}.")
    if kind is not None and cls.kind != kind:
        raise ConfigError(f"The part '{name}' is a {cls.kind}, not a {kind}.")
    return cls.kind


def _check_reducer(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Reducer)):
        raise ConfigError(f"The reducer '{name}' must subclass mllm_squeeze.reducers.base.Reducer; got {cls!r}.")


def check_method(name: Any, source: Any) -> Source:
    """Return the source of a method as it is; raises ConfigError where it, or the name, is of no use."""
    if not isinstance(name, str) or not name or name.endswith((".yaml", ".yml")):
        raise ConfigError(f"The name of a method is a word, and not that of a file (.yaml); got {name!r}.")
    if not isinstance(source, (str, Path, Mapping)):
        raise ConfigError(
            f"The method '{name}' must be the path of a recipe YAML or a dict, or a function that returns one; "
            f"got {source!r}."
        )
    return cast("Source", source)
