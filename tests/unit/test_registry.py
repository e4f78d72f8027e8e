"""Names: those that ship, those of other packages, those of this process; and importing no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mllm_squeeze import plugins, registry
from mllm_squeeze.amount import Amount
from mllm_squeeze.errors import ConfigError, UnknownNameError
from mllm_squeeze.recipe.recipe import load_recipe, register_method
from mllm_squeeze.reducers.base import Place, Reducer


class Mine(Reducer):
    places: ClassVar[frozenset[Place]] = frozenset({"projector"})


class Other(Mine):
    pass


RECIPE = {"method": "mine", "steps": [{"reducer": "mine", "at": "projector", "ratio": 0.5}]}
NOT_A_RECIPE = 5


def make_recipe() -> dict[str, Any]:
    return RECIPE


def raises() -> dict[str, Any]:
    raise ValueError("no luck")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_own_reducers", {})
    monkeypatch.setattr(registry, "_own_methods", {})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Yield the list that stands for the entry points of installed packages."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: [p for p in points if p.group == group])
    plugins.points.cache_clear()
    yield points
    plugins.points.cache_clear()


def point(name: str, value: str, group: str) -> EntryPoint:
    return EntryPoint(name, value if ":" in value else f"{__name__}:{value}", group)


@pytest.mark.parametrize("name", sorted(registry.BUILTIN_REDUCERS))
def test_every_reducer_that_ships_resolves(name: str) -> None:
    cls = registry.reducer_class(name)
    assert issubclass(cls, Reducer)
    assert cls.places
    assert f"{cls.__module__}:{cls.__name__}" == registry.BUILTIN_REDUCERS[name]


def test_an_unknown_reducer_gets_a_suggestion() -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown reducer 'text_rank_recicle'.*Did you mean 'text_rank_recycle'\?"
    ):
        registry.reducer_class("text_rank_recicle")


def test_an_unknown_method_gets_a_suggestion() -> None:
    registry.register_reducer("mine", Mine)
    register_method("mine", RECIPE)
    with pytest.raises(UnknownNameError, match=r"Unknown method 'min'.*Did you mean 'mine'\?"):
        registry.method_source("min")


def test_reducers_of_this_process() -> None:
    registry.register_reducer("mine", Mine)
    registry.register_reducer("mine", Mine)
    assert registry.reducer_class("mine") is Mine
    assert "mine" in registry.reducer_names()
    with pytest.raises(ConfigError, match="'mine' is taken.*unregister_reducer"):
        registry.register_reducer("mine", Other)
    registry.unregister_reducer("mine")
    registry.register_reducer("mine", Other)
    assert registry.reducer_class("mine") is Other
    with pytest.raises(UnknownNameError, match="No reducer 'yours' was registered"):
        registry.unregister_reducer("yours")


def test_names_that_ship_are_taken() -> None:
    with pytest.raises(ConfigError, match="'text_rank_recycle' is taken"):
        registry.register_reducer("text_rank_recycle", Mine)


@pytest.mark.parametrize("cls", [5, dict, Mine()])
def test_only_reducer_classes_register(cls: Any) -> None:
    with pytest.raises(ConfigError, match=r"must subclass mllm_squeeze\.reducers\.base\.Reducer"):
        registry.register_reducer("mine", cls)


def test_methods_of_this_process() -> None:
    registry.register_reducer("mine", Mine)
    register_method("mine", RECIPE)
    register_method("mine", dict(RECIPE))
    assert "mine" in registry.method_names()
    assert load_recipe("mine").steps[0].amount == Amount(ratio=0.5)
    with pytest.raises(ConfigError, match="'mine' is taken.*unregister_method"):
        register_method("mine", {**RECIPE, "summary": "Another."})
    with pytest.raises(ConfigError, match="must be the path of a recipe YAML or a dict"):
        register_method("yours", 5)  # type: ignore[arg-type]
    registry.unregister_method("mine")
    assert "mine" not in registry.method_names()
    with pytest.raises(UnknownNameError, match="No method 'mine' was registered"):
        registry.unregister_method("mine")


def test_reducers_and_methods_of_other_packages(installed: list[EntryPoint]) -> None:
    installed += [
        point("mine", "Mine", registry.REDUCERS_GROUP),
        point("mine", "RECIPE", registry.METHODS_GROUP),
        point("made", "make_recipe", registry.METHODS_GROUP),
    ]
    assert registry.reducer_class("mine") is Mine
    assert {"mine", "made"} <= set(registry.method_names())
    assert load_recipe("mine").source == "mine"
    assert load_recipe("made").method == "mine"


def test_families_of_other_packages(installed: list[EntryPoint]) -> None:
    installed.append(point("mine", "RECIPE", registry.FAMILIES_GROUP))
    assert registry.family_plugins() == {"mine": RECIPE}


def test_a_name_that_two_packages_use_is_refused_when_it_is_used(installed: list[EntryPoint]) -> None:
    installed += [point("mine", "Mine", registry.REDUCERS_GROUP), point("mine", "Other", registry.REDUCERS_GROUP)]
    assert registry.reducer_names().count("mine") == 1
    with pytest.raises(ConfigError, match="'mine' is taken twice, by .*Mine and .*Other"):
        registry.reducer_class("mine")


def test_a_package_cannot_shadow_what_ships(installed: list[EntryPoint]) -> None:
    installed.append(point("text_rank_recycle", "Mine", registry.REDUCERS_GROUP))
    with pytest.raises(ConfigError, match="'text_rank_recycle' is taken twice, by mllm_squeeze and"):
        registry.reducer_class("text_rank_recycle")


def test_one_package_found_twice_is_one(installed: list[EntryPoint]) -> None:
    installed += [point("mine", "Mine", registry.REDUCERS_GROUP)] * 2
    assert registry.reducer_class("mine") is Mine


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("NOT_A_RECIPE", "must be the path"),
        ("Missing", "cannot be loaded"),
        ("no_such_module:x", "cannot be loaded"),
        ("raises", "cannot be loaded: ValueError: no luck"),
        ("lazily:broken", "cannot be loaded: ZeroDivisionError"),
    ],
)
def test_broken_packages_are_named(
    installed: list[EntryPoint], value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazily.py").write_text("broken = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    installed.append(point("mine", value, registry.METHODS_GROUP))
    with pytest.raises(ConfigError, match=says):
        registry.method_source("mine")


def test_the_recipes_are_found_in_a_checkout() -> None:
    assert (registry.configs_dir() / "fastv.yaml").is_file()


def test_the_recipes_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "configs"
    packaged.mkdir()
    (packaged / "shipped.yaml").write_text("method: shipped\nsteps: [{reducer: mine, at: projector, ratio: 0.5}]\n")
    monkeypatch.setattr(registry, "files", lambda package: tmp_path)
    assert registry.configs_dir() == packaged
    assert registry.method_names() == ["shipped"]
    registry.register_reducer("mine", Mine)
    assert load_recipe("shipped").method == "shipped"


def test_missing_recipes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "files", lambda package: tmp_path)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "a" / "b" / "registry.py"))
    with pytest.raises(ConfigError, match="recipes that ship with mllm_squeeze are missing"):
        registry.method_names()


def test_names_and_recipes_load_without_torch() -> None:
    code = (
        "import sys; import mllm_squeeze; from mllm_squeeze import registry; from mllm_squeeze.recipe import recipe\n"
        "for name in registry.method_names(): recipe.describe(name)\n"
        "for name in registry.reducer_names(): registry.reducer_class(name)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
