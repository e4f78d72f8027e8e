"""What other packages bring through entry points; nothing of theirs is imported before its name is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mllm_squeeze.errors import ConfigError


@cache
def points(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name, read once; one package found twice on the path counts once."""
    out: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        same = out.setdefault(point.name, [])
        if all(point.value != other.value for other in same):
            same.append(point)
    return out


def from_packages(
    group: str, name: str, load: Callable[[EntryPoint], Any] | None = None
) -> list[tuple[str, Callable[[], Any]]]:
    """Return who offers a name in a group, each with the function that loads it.

    load: instead of taking what the entry point names.
    """
    return [(_package(point), partial(load or _load, point)) for point in points(group).get(name, [])]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # code of others: whatever it raises must not hide the other names
        raise _broken(point, error) from error


def load_method(point: EntryPoint) -> Any:
    """Return what an entry point says, the recipe itself where it is a function that returns one."""
    found = _load(point)
    try:
        return found() if callable(found) else found
    except Exception as error:
        raise _broken(point, error) from error


def _broken(point: EntryPoint, error: Exception) -> ConfigError:
    return ConfigError(
        f"The entry point '{point.name}' of {_package(point)} ({point.value}) cannot be loaded: "
        f"{type(error).__name__}: {error}. Repair or uninstall that package."
    )
