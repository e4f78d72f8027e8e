"""One request to a squeezed model: a budget of its own, and a record of its own."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from mllm_squeeze.engine.hooks.requests import Request, Requests
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.recipe.recipe import Recipe
from mllm_squeeze.reporting.prompted import Prompted

# How many budgets a handle remembers, so that asking for one again costs microseconds.
_REMEMBERED = 512


class Call(Request, Prompted):
    """What `Handle.using` returns: a block in which the model runs as asked, and the report of what ran in it.

    recipe: the method with the budget that was asked for.
    """

    _nothing_yet = (
        "Nothing to report: no prompt with an image or video went through the squeezed model inside of this block. Run "
        "the model in it, in the same thread or task, and without off=True."
    )

    def __init__(self, owner: Requests, recipe: Recipe, plan: Plan | None, as_around: bool) -> None:
        Request.__init__(self, owner, plan, as_around)
        Prompted.__init__(self)
        self.recipe = recipe

    def __enter__(self) -> Call:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


class Remembered:
    """The recipes and plans of budgets that were asked for, by the budget."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Recipe, Plan]] = {}

    def get(self, name: str, value: Any) -> tuple[Recipe, Plan] | None:
        """Return what was kept for a budget, None where nothing was."""
        key = _key(name, value)
        return None if key is None else self._known.get(key)

    def put(self, name: str, value: Any, found: tuple[Recipe, Plan]) -> None:
        """Keep what a budget comes to."""
        key = _key(name, value)
        if key is None:
            return
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[key] = found


def one_budget(given: dict[str, Any], off: bool) -> tuple[str, Any] | None:
    """Return the name and value of the one budget that is given, None without one.

    Raises:
        ConfigError: several are, or one beside `off`, or `off` is no bool.
    """
    budgets = [(name, value) for name, value in given.items() if value is not None]
    if not isinstance(off, bool):
        raise ConfigError(f"off is True for the dense model or False, got {off!r}.")
    if len(budgets) + off > 1:
        said = " and ".join([f"{name}={value}" for name, value in budgets] + (["off=True"] if off else []))
        raise ConfigError(f"{said} exclude each other: give one of ratio, keep, total and off.")
    return budgets[0] if budgets else None


def _key(name: str, value: Any) -> Any:
    # 1 and 1.0 are equal, and mean one token and all of them.
    if type(value) in (int, float):
        return name, type(value), value
    if type(value) in (list, tuple) and all(type(one) in (int, float) for one in value):
        return (name, *((type(one), one) for one in value))
    return None
