"""Recipes: read, overridden, checked and written back; and what each mistake says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from mllm_squeeze import registry
from mllm_squeeze.amount import RULE_DECIDES, RULES, Amount
from mllm_squeeze.errors import ConfigError, UnknownNameError
from mllm_squeeze.recipe import references, template
from mllm_squeeze.recipe.build import build_reducer
from mllm_squeeze.recipe.recipe import (
    Recipe,
    describe,
    facts,
    load_recipe,
    register_method,
    resolve_steps,
)
from mllm_squeeze.recipe.steps import At, Step, resolve_layers
from mllm_squeeze.reducers.base import DecodeReducer, Reducer
from mllm_squeeze.reducers.needs import Attention, Need, Place

Change = Callable[[dict[str, Any]], Any]


class Rank(Reducer):
    places: ClassVar[frozenset[Place]] = frozenset({"layer", "cache"})

    def needs(self) -> tuple[Need, ...]:
        return (Attention(),)

    rows: Literal["last", "text"] = "last"
    layer: int = 0


class Refresh(DecodeReducer):
    pass


class Deciding(Reducer):
    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    decides: ClassVar[bool] = True


class Pool(Reducer):
    places: ClassVar[frozenset[Place]] = frozenset({"encoder", "projector"})
    known_count: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_own_reducers", {"rank": Rank, "pool": Pool, "refresh": Refresh})
    monkeypatch.setattr(registry, "_own_methods", {})


def recipe(change: Change | None = None) -> dict[str, Any]:
    """Return a valid recipe: half of the tokens at layer 2, changed by `change`."""
    out: dict[str, Any] = {
        "method": "sketch",
        "summary": "A sketch.",
        "paper": {"title": "A paper", "arxiv": "2403.06764", "venue": "ECCV 2024"},
        "params": {"ratio": 0.5, "layer": 2},
        "steps": [{"reducer": "rank", "at": {"layer": "${layer}"}, "ratio": "${ratio}", "rows": "text"}],
    }
    if change is not None:
        change(out)
    return out


def step(**keys: Any) -> Change:
    """Return a change that adds a second step, which leaves a tenth where it names no other budget."""
    budget = {} if set(RULES) & set(keys) or keys.get("reducer") == "refresh" else {"ratio": 0.9}
    return lambda data: data["steps"].append({"reducer": "rank", **budget, **keys})


def schedule(data: dict[str, Any]) -> None:
    """Make the recipe a schedule over three layers, with a ratio and an optional list of kept fractions."""
    data["params"] = {"ratio": 0.875, "kept": None}
    data["steps"] = [{"reducer": "rank", "at": {"layers": [0.25, 0.5, 0.75]}, "ratio": "${ratio}", "kept": "${kept}"}]


def test_every_reference_becomes_a_typed_value() -> None:
    loaded = load_recipe(recipe())
    (only,) = loaded.steps
    assert loaded.params == {"ratio": 0.5, "layer": 2}
    assert only.at.layer == 2 and isinstance(only.at.layer, int)
    assert only.at.place == "layer"
    assert (only.amount, only.options) == (Amount(ratio=0.5), {"rows": "text"})
    assert build_reducer(only) == Rank(rows="text")


def test_params_override_the_recipe() -> None:
    (only,) = load_recipe(recipe(), ratio=0.75, layer=0.5).steps
    assert only.amount.ratio == 0.75
    assert only.at.layer == 0.5


def test_numpy_numbers_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    (only,) = load_recipe(recipe(), ratio=numpy.float32(0.25), layer=numpy.int64(3)).steps
    assert only.amount.ratio == 0.25 and type(only.amount.ratio) is float
    assert only.at.layer == 3 and type(only.at.layer) is int


@pytest.mark.parametrize("name", ["ratio", "keep", "total"])
def test_none_is_no_budget(name: str) -> None:
    """Taken for "not given" it would be the recipe's 0.5, which nobody asked for."""
    with pytest.raises(ConfigError, match=rf"sketch.*{name}=None is no budget.*leave {name} out.*ratio: 0\.5"):
        load_recipe(recipe(), **{name: None})


@pytest.mark.parametrize("budget", [{}, {"ratio": None}, {"keep": None}, {"total": None}, {"kept": None}])
def test_a_step_without_a_budget_is_refused(budget: dict[str, Any]) -> None:
    """Its reducer would never be called."""

    def bare(data: dict[str, Any]) -> None:
        data["params"] = {}
        data["steps"] = [{"reducer": "pool", "at": "projector", **budget}]

    with pytest.raises(ConfigError, match=r"sketch.*step 1: 'pool' has no budget.*ratio.*keep") as caught:
        load_recipe(recipe(bare))
    assert "kept" in str(caught.value)


def test_a_step_built_by_hand_without_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'pool' has no budget"):
        build_reducer(Step(reducer="pool", at=At.model_validate("projector")))


def test_who_decides_alone_needs_no_budget() -> None:
    registry.register_reducer("deciding", Deciding)
    steps = [{"reducer": "deciding", "at": "projector"}, {"reducer": "refresh", "at": {"cache": "decode"}}]
    for only in load_recipe({"method": "mine", "steps": steps}).steps:
        assert only.amount == RULE_DECIDES


class Tensorish:
    """As torch.Tensor(0.5) is: no number, but it holds one."""

    def item(self) -> float:
        return 0.5

    def __repr__(self) -> str:
        return "tensor(0.5000)"


@pytest.mark.parametrize("name", ["ratio", "keep", "layer"])
def test_a_tensor_is_told_to_become_a_number(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"sketch.*{name} is tensor\(0.5000\).*Tensorish.*{name}=\.\.\.\.item\(\)"):
        load_recipe(recipe(), **{name: Tensorish()})


def test_paths_become_words() -> None:
    loaded = load_recipe(recipe(lambda d: d.update(summary=Path("a") / "b")))
    assert loaded.summary == str(Path("a") / "b")


def test_a_file_is_parsed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    text = yaml.safe_dump(recipe())
    path.write_text(text)
    load_recipe(path)
    calls = []
    parse = template.yaml_text.parse
    monkeypatch.setattr(template.yaml_text, "parse", lambda text: calls.append(text) or parse(text))
    first, second = load_recipe(path), load_recipe(path)
    assert first == second and calls == []
    path.write_text(text.replace("ratio: 0.5", "ratio: 0.7"))  # of the same size, and within the clock's tick
    assert load_recipe(path).params["ratio"] == 0.7
    assert calls


def test_what_was_read_cannot_be_changed_by_who_got_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    before = load_recipe(path).model_dump()
    spoilt = load_recipe(path)
    spoilt.params["ratio"] = 0.9
    spoilt.raw["steps"][0]["rows"] = "last"
    spoilt.raw["params"]["ratio"] = 0.9
    spoilt.steps[0].options["rows"] = "last"
    assert load_recipe(path).model_dump() == before
    assert load_recipe(path).raw["params"]["ratio"] == 0.5


def test_one_and_true_are_not_taken_for_each_other() -> None:
    """They are equal, so what is remembered of one must not be handed out for the other."""
    (only,) = load_recipe(recipe(), layer=1).steps
    assert only.at.layer == 1 and type(only.at.layer) is int
    with pytest.raises(ConfigError, match="got 1.0"):
        load_recipe(recipe(), layer=1.0)
    with pytest.raises(ConfigError, match="got True"):
        load_recipe(recipe(), layer=True)


class TestRegistering:
    def test_it_is_read_and_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "broken.yaml"
        broken.write_text("method: [")
        wrong: list[tuple[Any, str]] = [
            ({"method": "mine"}, "steps is a list of at least one mapping"),
            ({"method": "mine", "steps": [{"reducer": "rnk", "at": "projector"}]}, r"Did you mean 'rank'\?"),
            ({"method": "mine", "steps": [{"reducer": "pool", "at": "projector"}]}, "has no budget"),
            (tmp_path / "nowhere.yaml", "there is no such recipe file"),
            ("nowhere.yaml", "there is no such recipe file"),
            (broken, "not a valid YAML recipe"),
            (5, "must be the path of a recipe YAML or a dict"),
        ]
        for source, says in wrong:
            with pytest.raises((ConfigError, UnknownNameError), match=rf"'mine'.*{says}"):
                register_method("mine", source)
            assert "mine" not in registry.method_names()

    @pytest.mark.parametrize("name", ["", "mine.yaml", 5, None])
    def test_a_name_that_cannot_be_asked_for_is_refused(self, name: Any) -> None:
        with pytest.raises(ConfigError, match="name"):
            register_method(name, recipe())

    def test_a_default_that_is_missing_is_no_mistake(self) -> None:
        register_method("mine", recipe(lambda d: d["params"].update(ratio="???")))
        assert load_recipe("mine", ratio=0.25).params["ratio"] == 0.25

    def test_a_path_does_not_follow_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe()))
        monkeypatch.chdir(tmp_path)
        register_method("mine", "mine.yaml")
        monkeypatch.chdir("/")
        assert load_recipe("mine").method == "sketch"

    def test_a_dict_that_is_changed_later_stays_as_it_was(self) -> None:
        data = recipe()
        register_method("mine", data)
        data["steps"].clear()
        assert load_recipe("mine") == load_recipe(recipe())


@pytest.mark.parametrize("keep", [64, 1, 0.25, 1.0])
def test_keep_replaces_ratio_wherever_it_is_referred_to(keep: float) -> None:
    loaded = load_recipe(recipe(step(at={"layer": 9}, ratio="${ratio}")), keep=keep)
    assert [one.amount for one in loaded.steps] == [Amount(keep=keep)] * 2
    assert all(type(one.amount.keep) is type(keep) for one in loaded.steps)
    assert loaded.params == {"layer": 2, "keep": keep}


def test_keep_leaves_fixed_ratios_alone() -> None:
    first, second = load_recipe(recipe(step(at={"layer": 9}, ratio=0.9)), keep=64).steps
    assert first.amount == Amount(keep=64)
    assert second.amount == Amount(ratio=0.9)


def test_ratio_replaces_keep_where_the_recipe_says_keep() -> None:
    def said_as_keep(data: dict[str, Any]) -> None:
        data["params"] = {"keep": 64}
        data["steps"] = [{"reducer": "pool", "at": "projector", "keep": "${keep}"}]

    (only,) = load_recipe(recipe(said_as_keep), ratio=0.5).steps
    assert only.amount == Amount(ratio=0.5)
    (only,) = load_recipe(recipe(said_as_keep), total=96).steps
    assert only.amount == Amount(total=96)


def test_a_total_and_a_list_of_numbers_take_the_place_of_a_ratio() -> None:
    loaded = load_recipe(recipe(step(at={"layer": 9}, ratio="${ratio}")), total=96)
    assert [one.amount for one in loaded.steps] == [Amount(total=96)] * 2
    assert loaded.params == {"layer": 2, "total": 96}
    loaded = load_recipe(recipe(), ratio=(0.5, 0.9))
    assert loaded.steps[0].amount == Amount(ratio=[0.5, 0.9]) and loaded.steps[0].amount.by_row
    assert load_recipe(yaml.safe_load(loaded.to_yaml())) == loaded
    assert load_recipe(recipe(schedule), total=96).steps[0].amount == Amount(total=96)


@pytest.mark.parametrize("params", [{}, {"keep": 64}, {"ratio": 0.9, "layer": 0.3}])
def test_recipes_round_trip_through_yaml(params: dict[str, Any], tmp_path: Path) -> None:
    first = load_recipe(recipe(step(reducer="refresh", at={"cache": "decode"})), **params)
    path = tmp_path / "sketch.yaml"
    path.write_text(first.to_yaml())
    again = load_recipe(path)
    assert again == first
    assert again.source == str(path) and first.source == "dict"
    # What was a param still is one, so that the written recipe takes other values.
    assert load_recipe(path, layer=5).steps[0].at.layer == 5


def test_keys_round_trip() -> None:
    first = load_recipe({"method": "mine", "steps": [{"reducer": "pool", "at": "keys", "keep": 3}]})
    assert first.steps[0].at.keys
    assert str(first.steps[0].at) == first.to_dict()["steps"][0]["at"] == "keys"
    assert load_recipe(yaml.safe_load(first.to_yaml())) == first
    assert first.model_copy(update={"raw": {}}).to_dict()["steps"][0]["at"] == "keys"


def test_schedules_round_trip() -> None:
    first = load_recipe(recipe(schedule), kept=[0.5, 0.5, 0.25])
    assert load_recipe(yaml.safe_load(first.to_yaml())) == first
    assert first != load_recipe(recipe(schedule))


def test_a_recipe_built_by_hand_writes_yaml() -> None:
    made = Recipe(method="mine", steps=load_recipe(recipe()).steps)
    assert load_recipe(yaml.safe_load(made.to_yaml())) == made


def test_loading_leaves_the_dict_alone() -> None:
    data = recipe()
    before = copy.deepcopy(data)
    load_recipe(data, keep=3)
    assert data == before


def test_kept_takes_the_place_of_the_default_ratio_and_back() -> None:
    (only,) = load_recipe(recipe(schedule)).steps
    assert only.amount == Amount(ratio=0.875)
    (only,) = load_recipe(recipe(schedule), kept=(0.5, 0.3, 0.1)).steps
    assert only.amount == Amount(kept=(0.5, 0.3, 0.1))
    written = load_recipe(recipe(schedule), kept=(0.5, 0.3, 0.1)).to_dict()
    with pytest.raises(ConfigError, match="unknown param 'ratio'"):
        load_recipe(written, ratio=0.5)


def test_the_source_is_a_name_a_path_or_a_dict(tmp_path: Path) -> None:
    path = tmp_path / "sketch.yml"
    path.write_text(yaml.safe_dump(recipe()))
    bare = tmp_path / "sketch"
    bare.write_text(yaml.safe_dump(recipe()))
    register_method("by_dict", recipe())
    register_method("by_path", path)
    for source in (path, str(path), str(bare), "by_dict", "by_path", recipe()):
        loaded = load_recipe(source)
        assert loaded == load_recipe(recipe())
        assert loaded.source == ("dict" if isinstance(source, dict) else str(source))


WRONG: list[tuple[Change | None, dict[str, Any], list[str]]] = [
    # The budget.
    (None, {"ratio": 1.5}, ["step 1", "ratio is the fraction removed", "got 1.5"]),
    (None, {"ratio": 1}, ["ratio is the fraction removed", "below 1", "got 1"]),
    (None, {"ratio": -0.1}, ["ratio is the fraction removed", "got -0.1"]),
    (None, {"ratio": "half"}, ["ratio is the fraction removed", "got 'half'"]),
    (None, {"ratio": True}, ["ratio is the fraction removed", "got True"]),
    (None, {"ratio": float("nan")}, ["ratio is the fraction removed", "got nan"]),
    (None, {"keep": 0}, ["keep is the tokens kept per span", "got 0"]),
    (None, {"keep": 1.5}, ["fraction kept", "got 1.5"]),
    (None, {"keep": False}, ["keep is", "got False"]),
    (None, {"total": 0}, ["step 1", "total is the tokens kept of all spans of one prompt", "got 0"]),
    (None, {"total": 0.5}, ["total is", "an int, at least 1", "got 0.5"]),
    (None, {"total": True}, ["total is", "got True"]),
    (None, {"total": "96"}, ["total is", "got '96'"]),
    (None, {"ratio": []}, ["a list of such numbers, one for each row of the batch", "got []"]),
    (None, {"ratio": [0.5, 1.5]}, ["ratio is the fraction removed", "got [0.5, 1.5]"]),
    (None, {"keep": [64, True]}, ["keep is the tokens kept", "got [64, True]"]),
    (None, {"total": [96, 0]}, ["total is", "got [96, 0]"]),
    (None, {"keep": 64, "total": 96}, ["keep=64 and total=96 exclude each other: give one"]),
    (lambda d: d["steps"][0].update(total=96), {}, ["step 1", "ratio and total exclude each other", "got ratio and"]),
    (schedule, {"kept": [0.5, "half", 0.3]}, ["kept are cumulative", "got [0.5, 'half', 0.3]"]),
    (schedule, {"kept": 0.5}, ["kept are cumulative", "one for each layer", "got 0.5"]),
    (
        lambda d: d["steps"].insert(0, {"reducer": "pool", "at": {"encoder": 3}, "total": 96}),
        {},
        ["step 1", "total=96 speaks of prompts", "the encoder sees all pictures of a batch at once"],
    ),
    (
        step(at={"layer": 9}, ratio=[0.6, 0.3]),
        {},
        ["a later step leaves no more", "step 2 keeps 0.7, after a step that keeps 0.5"],
    ),
    (step(at={"cache": "decode"}, reducer="refresh", total=3), {}, ["step 2", "total has no effect on 'refresh'"]),
    (None, {"ratio": 0.5, "keep": 64}, ["ratio=0.5 and keep=64 exclude each other", "ratio is the fraction removed"]),
    (
        lambda d: d["steps"][0].update(keep=3),
        {},
        ["ratio and keep exclude each other", "ratio is the fraction removed"],
    ),
    (schedule, {"ratio": 0.5, "kept": [0.5, 0.4, 0.3]}, ["exclude each other"]),
    (schedule, {"kept": [0.5, 0.4]}, ["2 fractions for 3 layers"]),
    (schedule, {"kept": [0.3, 0.4, 0.5]}, ["never rising", "[0.3, 0.4, 0.5]"]),
    (schedule, {"kept": [1.5, 0.4, 0.3]}, ["at most 1"]),
    (step(at={"layer": 9}, kept=[0.5]), {}, ["step 2", "kept is a schedule over {layers: [...]}"]),
    (step(at={"layers": [4, 8]}, kept=[0.5, 0.2], ratio=0.8), {}, ["step 2", "kept and ratio exclude each other"]),
    (step(at={"layer": 9}, ratio=0.1), {}, ["a later step leaves no more", "step 2 keeps 0.9", "keeps 0.5"]),
    (
        lambda d: d["params"].update(ratio=0.5) or d["steps"][0].update(layer="${ratio}"),
        {"keep": 3},
        ["only be given a"],
    ),
    # Params and references.
    (None, {"layr": 3}, ["unknown param 'layr'", "Allowed: keep, layer, ratio, total", "Did you mean 'layer'?"]),
    (lambda d: d["params"].update(spare=1), {}, ["the param 'spare' is not used"]),
    (
        lambda d: d["steps"][0].update(ratio="${rato}"),
        {},
        ["${rato} is not one of its params", "Did you mean 'ratio'?"],
    ),
    (lambda d: d["steps"][0].update(rows="${oc.env:HOME}"), {}, ["${oc.env:HOME} is not one of its params"]),
    (lambda d: d["params"].update(layer="???"), {}, ["the param layer has no default"]),
    (lambda d: d["params"].update(layer="${layer}"), {}, ["${layer} refers to itself"]),
    (lambda d: d["params"].update(layer="${top}", top="${layer}"), {}, ["refers to itself"]),
    (None, {"layer": object()}, ["sketch", "object"]),
    (None, {"layer": "${nowhere}"}, ["sketch", "nowhere"]),
    (lambda d: d.update(params=[1]), {}, ["params is a mapping", "got [1]"]),
    (lambda d: d.update(summary=object()), {}, ["sketch", "object"]),
    # Keys.
    (lambda d: d.update(stepz=1), {}, ["unknown key 'stepz'", "Did you mean 'steps'?"]),
    (lambda d: d.update(source="x"), {}, ["unknown key 'source'"]),
    (lambda d: d.update(paper={"titel": "x"}), {}, ["unknown key 'paper.titel'", "Did you mean 'title'?"]),
    (lambda d: d["steps"][0].update(row="text"), {}, ["step 1", "unknown key 'row'", "Did you mean 'rows'?"]),
    (lambda d: d["steps"][0].update(options={}), {}, ["unknown key 'options'"]),
    (lambda d: d["steps"][0].update(at={"layr": "${layer}"}), {}, ["unknown key 'at.layr'", "Did you mean 'layer'?"]),
    (
        lambda d: d["steps"][0].update(att=d["steps"][0].pop("at")),
        {},
        ["the key 'at' is missing", "'att' looks like it"],
    ),
    (lambda d: d["steps"][0].pop("reducer"), {}, ["step 1", "unknown key", "Allowed: at, budget", "reducer, score"]),
    (lambda d: d.pop("method"), {}, ["the key 'method' is missing"]),
    (lambda d: d.pop("steps"), {}, ["steps is a list of at least one mapping"]),
    (lambda d: d.update(steps=[]), {}, ["steps is a list of at least one mapping", "got []"]),
    (lambda d: d.update(steps=["rank"]), {}, ["steps is a list of at least one mapping"]),
    # Types and words.
    (lambda d: d.update(positions="repak"), {}, ["positions", "'keep' or 'repack'", "Did you mean 'repack'?"]),
    (
        lambda d: d["steps"][0].update(rows="txt"),
        {},
        ["step 1", "rows", "'last' or 'text'", "got 'txt'", "mean 'text'"],
    ),
    (lambda d: d["steps"][0].update(layer="two"), {}, ["layer", "valid integer", "got 'two'"]),
    # Places.
    (None, {"layer": -1}, ["a zero-based index", "got -1"]),
    (None, {"layer": 1.5}, ["a fraction of the depth", "got 1.5"]),
    (None, {"layer": "2"}, ["at.layer", "got '2'"]),
    (None, {"layer": True}, ["at.layer", "got True"]),
    (step(at={"layers": []}), {}, ["layers is empty"]),
    (step(at={"layers": [8, 4]}), {}, ["layers must ascend", "[8, 4]"]),
    (step(at={"cache": "prefil"}), {}, ["at.cache", "got 'prefil'", "Did you mean 'prefill'?"]),
    (step(at="cache"), {}, ["give 'projector', 'keys' or one of", "{cache: prefill}", "got 'cache'"]),
    (step(at={}), {}, ["give exactly one of", "got none"]),
    (step(at={"layer": 3, "cache": "decode"}), {}, ["give exactly one of", "layer and cache"]),
    (lambda d: d["steps"].insert(0, {"reducer": "pool", "at": {"encoder": -2}}), {}, ["encoder is 'all' or", "got -2"]),
    (step(at={"cache": "decode"}), {}, ["'rank' cannot act at cache decode", "at the end of the prefill"]),
    (step(reducer="refresh", at={"cache": "decode"}, keep=3), {}, ["step 2", "keep has no effect on 'refresh'"]),
    (step(reducer="refresh", at={"cache": "prefill"}), {}, ["cannot act at cache prefill", "write {cache: decode}"]),
    (
        lambda d: d["steps"].extend([{"reducer": "rank", "at": {"cache": "prefill"}, "ratio": 0.9}] * 2),
        {},
        ["at most one step"],
    ),
    (step(at="keys"), {}, ["'rank' cannot act at keys", "Its places are: cache, layer"]),
    (step(at="projector"), {}, ["'rank' cannot act at projector", "Its places are: cache, layer"]),
    (lambda d: d["steps"][0].update(reducer="pool", rows=None), {}, ["'pool' cannot act at layer 2"]),
    (step(at={"layer": 1}, ratio=0.9), {}, ["ascending order of place", "step 2 acts at layer 1, after layer 2"]),
    (
        lambda d: d["steps"].insert(0, {"reducer": "rank", "at": {"cache": "prefill"}, "ratio": 0.1}),
        {},
        ["ascending order of place"],
    ),
]


@pytest.mark.parametrize(("change", "params", "says"), WRONG)
def test_a_mistake_says_what_and_where(change: Change | None, params: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(change), **params)
    message = str(caught.value)
    for words in ["sketch" if "method" in recipe(change) else "recipe dict", *says]:
        assert words in message
    assert "\n" not in message


def test_an_unknown_reducer_says_where_and_what_is_there() -> None:
    with pytest.raises(UnknownNameError, match=r"sketch.*step 1: Unknown reducer 'rnk'.*Did you mean 'rank'\?"):
        load_recipe(recipe(lambda data: data["steps"][0].update(reducer="rnk")))


def test_an_unknown_method_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    register_method("sketch", recipe())
    with pytest.raises(
        UnknownNameError, match=r"Unknown method 'sketsh'.*Did you mean 'sketch'\?.*path of a recipe file"
    ):
        load_recipe("sketsh")


def test_a_recipe_without_budget_takes_none() -> None:
    def bare(data: dict[str, Any]) -> None:
        data["params"] = {"layer": 2}
        del data["steps"][0]["ratio"]

    for params in ({"ratio": 0.5}, {"keep": 8}):
        with pytest.raises(ConfigError, match=r"unknown param '(ratio|keep)'. Allowed: layer"):
            load_recipe(recipe(bare), **params)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: [", "line "),
        ("method: a\nmethod: b\nsteps: []", "duplicate"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("just words", "a recipe is a mapping"),
        ("5", "a recipe is a mapping"),
        ("method: &a [*a]", "an alias"),
    ],
)
def test_bad_files_name_the_file(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_what_no_file_can_be_called_is_an_unknown_method(name: str) -> None:
    with pytest.raises(UnknownNameError, match="Unknown method"):
        load_recipe(name)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such recipe file"):
        load_recipe("nowhere.yaml")


def test_a_source_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="a name, the path of a YAML file or a dict; got 5"):
        load_recipe(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("at", "depth", "layers"),
    [
        ("projector", 4, (0,)),
        ("keys", 4, (0,)),
        ({"layer": 0}, 4, (0,)),
        ({"layer": 3}, 4, (3,)),
        ({"layer": 0.5}, 5, (3,)),  # 2.5 rounds up
        ({"layer": 0.7}, 5, (4,)),  # 3.4999999999999996 as a float, 3.5 on paper
        ({"layer": 0.01}, 32, (1,)),
        ({"layer": 0.99}, 32, (31,)),
        ({"layers": [0.25, 0.5, 0.75]}, 32, (8, 16, 24)),
        ({"layers": [0.1, 0.2, 0.3]}, 4, (1, 2, 3)),
        ({"layers": [2, 0.5]}, 28, (2, 14)),
        ({"layers": [0.25, 0.5, 0.75]}, 2, (1, 1, 1)),  # too few: they fall on one
        ({"layers": [0.7, 0.8, 0.9]}, 4, (3, 3, 3)),
        ({"encoder": "all"}, 3, (0, 1, 2)),
        ({"encoder": 2}, 3, (2,)),
        ({"cache": "decode"}, 3, ()),
    ],
)
def test_places_become_layers(at: Any, depth: int, layers: tuple[int, ...]) -> None:
    assert resolve_layers(At.model_validate(at), depth) == layers


@pytest.mark.parametrize(
    ("at", "depth", "says"),
    [
        ({"layer": 32}, 32, r"decoder has 32 layers, so .*from 0 to 31; got 32"),
        ({"layers": [4, 40]}, 32, r"from 0 to 31; got 40"),
        ({"encoder": 32}, 32, r"encoder has 32 layers.*from 0 to 31; got 32"),
        ({"layers": [0.25, 0.5, 0.75]}, 1, "1 layers are too few"),
        ({"layers": [0.5, 2]}, 32, "2 is not behind layer 16"),
        ({"layers": [20, 0.5]}, 32, None),
    ],
)
def test_layers_out_of_range_say_the_range(at: Any, depth: int, says: str | None) -> None:
    if says is None:
        # A fraction moves up behind the index before it.
        assert resolve_layers(At.model_validate(at), depth) == (20, 21)
        return
    with pytest.raises(ConfigError, match=says):
        resolve_layers(At.model_validate(at), depth)


def test_a_layer_out_of_range_names_the_step() -> None:
    with pytest.raises(ConfigError, match=r"recipe dict 'sketch', step 1: this model's decoder has 18 layers.*got 40"):
        resolve_steps(load_recipe(recipe(), layer=40), 18)


def test_an_index_behind_a_fraction_is_found_when_the_depth_is_known() -> None:
    loaded = load_recipe(recipe(step(at={"layer": 9}, ratio=0.9)), layer=0.5)
    assert resolve_steps(loaded, 18) == ((9,), (9,))
    with pytest.raises(ConfigError, match=r"step 2.*it starts at layer 9.*reaches layer 16"):
        resolve_steps(loaded, 32)


def test_layer_zero_is_the_projector_said_otherwise() -> None:
    def at_zero(data: dict[str, Any]) -> None:
        data["steps"][0] = {"reducer": "pool", "at": {"layer": "${layer}"}, "ratio": "${ratio}"}

    (only,) = load_recipe(recipe(at_zero), layer=0).steps
    assert resolve_layers(only.at, 8) == (0,)
    with pytest.raises(ConfigError, match="'pool' cannot act at layer 1"):
        load_recipe(recipe(at_zero), layer=1)


def test_facts_are_those_of_all_steps() -> None:
    loaded = load_recipe(
        recipe(lambda data: data["steps"].insert(0, {"reducer": "pool", "at": "projector", "keep": 99}))
    )
    assert facts(loaded) == {
        "acts_in": ["projector", "layer"],
        "places": ["projector", "layer 2"],
        "known_count": False,
        "exact": False,
        "decides": False,
        "merges": False,
        "reads_text": True,
        "text_encoder": False,
        "signals": ["Attention"],
        "modalities": ["image", "video", "audio"],
    }


def test_describe_is_plain_data() -> None:
    told = describe(recipe())
    assert told["params"] == {"ratio": 0.5, "layer": 2}
    assert told["steps"][0]["at"] == {"layer": 2}
    assert told["paper"]["arxiv"] == "2403.06764"
    assert "${ratio}" in told["yaml"]


@pytest.mark.parametrize("name", registry.method_names())
def test_every_method_that_ships_loads(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.method == name
    assert loaded.summary
    assert [build_reducer(one) for one in loaded.steps]
    assert load_recipe(yaml.safe_load(loaded.to_yaml())) == loaded


@pytest.mark.parametrize("name", registry.method_names())
def test_every_method_that_ships_takes_zero_and_refuses_one(name: str) -> None:
    if "ratio" in load_recipe(name).params:
        # Where several steps have a budget of their own, an earlier one may leave no room for the last.
        budgets = {
            param for step in load_recipe(name).raw["steps"] for param in references.names(step.get("ratio", ""))
        }
        assert load_recipe(name, **dict.fromkeys(budgets, 0)).params["ratio"] == 0
        with pytest.raises(ConfigError, match="ratio is the fraction removed"):
            load_recipe(name, ratio=1)


def test_methods_ship() -> None:
    assert len(registry.method_names()) >= 12
