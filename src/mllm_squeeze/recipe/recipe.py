"""A method is a YAML file: this reads it, fills in its parameters, checks it and writes it back, without torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from mllm_squeeze import registry
from mllm_squeeze.amount import RULES, Amount
from mllm_squeeze.errors import ConfigError, SqueezeError
from mllm_squeeze.recipe import template, yaml_text
from mllm_squeeze.recipe.build import PIPELINE, STEP_KEYS
from mllm_squeeze.recipe.rules import Strict, explain
from mllm_squeeze.recipe.steps import At, Step, check_order, check_totals, meeting, resolve_layers
from mllm_squeeze.reducers.base import MODALITIES, DecodeReducer, Reducer
from mllm_squeeze.reducers.needs import Embedding, Need

Mechanism = Literal["attention", "similarity", "transformation", "query"]
PLACES = ("encoder", "keys", "projector", "layer", "cache")
_PROVENANCE = ("source", "raw")


class Paper(Strict):
    """The publication that a method comes from."""

    title: str
    arxiv: str | None = None
    venue: str | None = None


class Recipe(Strict):
    """A method: its parameters, filled in, and its steps in the order in which they run.

    aliases: other names that people type; capitals, dashes and underscores are never told apart.
    mechanism: what tells a token from others, in the words of arXiv 2507.20198: the attention it gets, how alike it is
        to others, a transformation of the grid (pooling), or the question ("query"). Baselines have none.
    variants: for each word of the param `variant` a table of values that steps refer to.
    source: the method name or path it was loaded from, or "dict". raw: the same recipe with its `${...}` references.
    """

    method: str
    summary: str = ""
    paper: Paper | None = None
    aliases: tuple[str, ...] = ()
    mechanism: Mechanism | None = None
    positions: Literal["keep", "repack"] = "keep"
    params: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    steps: tuple[Step, ...] = Field(min_length=1)
    source: str = Field(default="dict", exclude=True, repr=False)
    raw: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        check_order(self.steps)
        check_totals(self.steps)
        return self

    def __eq__(self, other: object) -> bool:
        # Where a recipe was found is no part of what it says.
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that `load_recipe` reads back; what was a `${...}` reference still is."""
        if self.raw:
            return copy.deepcopy(self.raw)
        out = self.model_dump(exclude={"steps", "params", "variants"}, exclude_none=True)
        out["steps"] = [_flat(step) for step in self.steps]
        return out

    def to_yaml(self) -> str:
        """Return the text of a recipe file that loads as an equal recipe."""
        return yaml_text.write(self.to_dict())


def load_recipe(source: str | Path | Mapping[str, Any], /, **params: Any) -> Recipe:
    """Load, fill in and check a recipe: a method name, the path of a YAML file or a dict; `params` override its own.

    Raises ConfigError for anything that is not valid and UnknownNameError for an unknown method or reducer.
    """
    raw, where, origin = _read(source)
    return _filled_in(raw, params, where, origin)


def with_budget(recipe: Recipe, name: str, value: Any) -> Recipe:
    """Return the recipe that `load_recipe` gives with another budget, `ratio`, `keep` or `total`; raises like it."""
    return _filled_in(recipe.to_dict(), {name: value}, f"method '{recipe.method}'", recipe.source)


def _filled_in(raw: dict[str, Any], params: Mapping[str, Any], where: str, origin: str) -> Recipe:
    raw = template.override(raw, params, where)
    plain = template.resolve(raw, where)
    steps = []
    for number, entry in enumerate(plain.pop("steps"), 1):
        steps.append(_step(entry, f"{where}, step {number}"))
    try:
        return Recipe(**{**plain, "steps": tuple(steps)}, source=origin, raw=raw)
    except ValidationError as error:
        raise ConfigError(explain(error, where, Recipe, plain, hide=_PROVENANCE)) from None


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
    """Return `template.read`, with its shape checked."""
    raw, where, origin = template.read(source)
    template.check_shape(raw, [name for name in Recipe.model_fields if name not in _PROVENANCE], where)
    return raw, where, origin


def register_method(name: str, source: registry.Source) -> None:
    """Add a method for this process, after it was read and checked.

    name: what `apply` and the others call it. source: the path of a recipe file, or a dict.

    Raises:
        ConfigError: the name is taken or cannot be asked for, or the recipe is not valid. UnknownNameError: it names an
            unknown reducer.
    """
    source = registry.check_method(name, source)
    # What was checked is what stays: a dict may be changed later, a relative path means another file elsewhere.
    source = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else Path(source).absolute()
    try:
        raw, _, _ = _read(source)
        if not template.required(raw):  # what has no default cannot be filled in yet
            load_recipe(source)
    except SqueezeError as error:
        raise type(error)(f"The method '{name}' cannot be registered: {error}") from None
    registry.add_method(name, source)


def resolve_steps(recipe: Recipe, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Return `resolve_layers` of each step, () for encoder steps.

    Raises:
        ConfigError: a step starts in front of the end of an earlier one that reduces the same modality.
    """
    out = tuple(() if step.at.place == "encoder" else _layers(step, num_layers) for step in recipe.steps)
    for found in meeting(recipe.steps):
        last = 0
        for step, layers in ((step, out[number - 1]) for number, step in found):
            if layers and layers[0] < last:
                raise ConfigError(
                    f"{step.where}: steps run in ascending order of place, but in this model of {num_layers} layers it "
                    f"starts at layer {layers[0]}, behind the step before, which reaches layer {last}."
                )
            last = layers[-1] if layers else last
    return out


def _layers(step: Step, num_layers: int) -> tuple[int, ...]:
    try:
        return resolve_layers(step.at, num_layers)
    except ConfigError as error:
        raise ConfigError(f"{step.where}: {error}" if step.where else str(error)) from None


def facts(recipe: Recipe) -> dict[str, Any]:
    """Return what tools ask of a method.

    These are `places`, `acts_in` (the kinds of places, of `PLACES`, in the order of the steps), `known_count`, `exact`,
    `decides`, `merges`, `reads_text`, `text_encoder` (whether the user has to give one), `signals` and `modalities`,
    what at least one step reduces.
    """
    reducers = [step.built for step in recipe.steps]
    rules = [reducer.facts for reducer in reducers]
    modalities = frozenset[str]().union(*(rule.modalities for rule in rules))
    return {
        "places": [str(step.at) for step in recipe.steps],
        "acts_in": list(dict.fromkeys(_kind(step.at) for step in recipe.steps)),
        "known_count": all(rule.known_count for rule in rules),
        # In the encoder a budget holds for the patches of each tile, before they become tokens of a span.
        "exact": all(r.exact and step.at.place != "encoder" for r, step in zip(rules, recipe.steps, strict=True)),
        "decides": any(rule.decides for rule in rules),
        "merges": any(rule.merges for rule in rules),
        "reads_text": any(rule.reads_text for rule in rules),
        "text_encoder": any(_wants_encoder(need) for reducer in reducers for need in reducer.needs()),
        "signals": sorted({name for reducer in reducers for name in _signals(reducer)}),
        "modalities": [name for name in MODALITIES if name in modalities],
    }


def _kind(at: At) -> str:
    """Return the kind of a place; what is cut at layer 0 is cut in front of the LLM."""
    return "keys" if at.keys else "projector" if at.layer == 0 else at.place


def _wants_encoder(need: Need) -> bool:
    return isinstance(need, Embedding) and need.space == "clip" and not need.fallback


def _signals(reducer: Reducer) -> list[str]:
    # Reducers that act while decoding are handed the attention of each step unasked.
    decodes = ["Attention"] if isinstance(reducer, DecodeReducer) else []
    return [*(type(need).__name__ for need in reducer.needs()), *decodes]


def describe(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's recipe and facts as plain data; raises like `load_recipe`."""
    recipe = load_recipe(source)
    plain = recipe.model_dump(include={"method", "summary", "paper", "aliases", "mechanism", "positions", "params"})
    steps = [_flat(step) for step in recipe.steps]
    return {**plain, "steps": steps, "facts": facts(recipe), "source": recipe.source, "yaml": recipe.to_yaml()}


def _flat(step: Step) -> dict[str, Any]:
    named = {} if step.reducer == PIPELINE else {"reducer": step.reducer}
    return {**named, "at": step.at.to_yaml(), **step.amount.to_yaml(), **step.options}


def _step(entry: Mapping[str, Any], where: str) -> Step:
    known = {key: value for key, value in entry.items() if key in STEP_KEYS and key not in RULES}
    options = {key: value for key, value in entry.items() if key not in STEP_KEYS}
    try:
        amount = Amount(**{key: value for key, value in entry.items() if key in RULES})
        step = Step(**known, amount=amount, options=options, where=where)
    except ValidationError as error:
        raise ConfigError(explain(error, where, Step, entry, hide=("amount", "options", "where"))) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}.") from None
    _ = step.built  # a slip shows now, not when the method is applied
    return step
