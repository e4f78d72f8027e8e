"""A method is a YAML file: this reads it, fills in its parameters, checks it and writes it back, without torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, model_validator

from mllm_squeeze import registry, template
from mllm_squeeze.errors import ConfigError, UnknownNameError
from mllm_squeeze.reducers.base import DecodeReducer, Place, Reducer
from mllm_squeeze.validation import check_budget, check_kept, check_layers, check_order, check_totals, explain

_STEP_KEYS = ("reducer", "at", "kept")
_PROVENANCE = ("source", "raw")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Paper(_Model):
    """The publication that a method comes from."""

    title: str
    arxiv: str | None = None
    venue: str | None = None


class At(_Model):
    """Where a step acts: exactly one of `encoder`, `keys`, `projector`, `layer`, `layers` and `cache`.

    encoder: "all" or the zero-based index of a block of the vision encoder. keys: on image features that are attended
    to from outside, by the queries of a Q-Former or by the text in cross-attention layers. layer, layers: the
    zero-based index of the first decoder layer that runs short, or a fraction of the depth, a float between 0 and 1.
    """

    encoder: Literal["all"] | StrictInt | None = None
    keys: Literal[True] | None = None
    projector: Literal[True] | None = None
    layer: StrictInt | StrictFloat | None = None
    layers: tuple[StrictInt | StrictFloat, ...] | None = None
    cache: Literal["prefill", "decode"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        if value in ("projector", "keys"):
            return {value: True}
        if isinstance(value, Mapping):
            return value
        raise ValueError(
            "give 'projector', 'keys' or one of {encoder: all}, {encoder: 3}, {layer: 2}, {layers: [0.25, 0.5]}, "
            f"{{cache: prefill}} and {{cache: decode}}; got {value!r}"
        )

    @model_validator(mode="after")
    def _one_place(self) -> At:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of encoder, keys, projector, layer, layers and cache; got "
                + (" and ".join(given) or "none")
            )
        if isinstance(self.encoder, int) and self.encoder < 0:
            raise ValueError(f"encoder is 'all' or the zero-based index of a block; got {self.encoder}")
        check_layers((self.layer,) if self.layer is not None else self.layers)
        return self

    @property
    def place(self) -> Place:
        """The kind of place, in the words of `Reducer.places`."""
        if self.encoder is not None:
            return "encoder"
        if self.cache is not None:
            return "cache"
        return "projector" if self.projector or self.keys else "layer"

    def to_yaml(self) -> str | dict[str, Any]:
        """Return the value of `at` as a recipe says it."""
        if self.projector or self.keys:
            return "projector" if self.projector else "keys"
        return {name: list(v) if isinstance(v, tuple) else v for name, v in self if v is not None}

    def __str__(self) -> str:
        value = self.to_yaml()
        if isinstance(value, str):
            return value
        ((name, where),) = value.items()
        return f"{name} {', '.join(map(str, where)) if isinstance(where, list) else where}"


class Step(_Model):
    """One reducer at one place.

    kept: the fractions of the original tokens left after each of `at.layers`. options: the parameters of the reducer's
    class. where: which step of which recipe this is, for messages.
    """

    reducer: str
    at: At
    kept: tuple[float, ...] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    where: str = Field(default="", exclude=True, repr=False)

    @model_validator(mode="after")
    def _budgets(self) -> Step:
        check_budget(self.options)
        if self.kept is not None:
            check_kept(self.kept, self.at.layers, self.options)
        return self


class Recipe(_Model):
    """A method: its parameters, filled in, and its steps in the order in which they run.

    source: the method name or path it was loaded from, or "dict". raw: the same recipe with its `${...}` references.
    """

    method: str
    summary: str = ""
    paper: Paper | None = None
    positions: Literal["keep", "repack"] = "keep"
    params: dict[str, Any] = Field(default_factory=dict)
    steps: tuple[Step, ...] = Field(min_length=1)
    source: str = Field(default="dict", exclude=True, repr=False)
    raw: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        check_order([step.at for step in self.steps])
        check_totals(self.steps)
        return self

    def __eq__(self, other: object) -> bool:
        # Where a recipe was found is no part of what it says.
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that `load_recipe` reads back; what was a `${...}` reference still is."""
        if self.raw:
            return copy.deepcopy(self.raw)
        out = self.model_dump(exclude={"steps", "params"}, exclude_none=True)
        out["steps"] = [_flat(step) for step in self.steps]
        return out

    def to_yaml(self) -> str:
        """Return the text of a recipe file that loads as an equal recipe."""
        return str(OmegaConf.to_yaml(OmegaConf.create(self.to_dict())))


def load_recipe(source: str | Path | Mapping[str, Any], /, **params: Any) -> Recipe:
    """Load, fill in and check a recipe: a method name, the path of a YAML file or a dict; `params` override its own.

    Raises ConfigError for anything that is not valid and UnknownNameError for an unknown method or reducer.
    """
    raw, where, origin = template.read(source)
    template.check_shape(raw, [name for name in Recipe.model_fields if name not in _PROVENANCE], where)
    raw = template.override(raw, params, where)
    plain = template.resolve(raw, where)
    steps = []
    for number, entry in enumerate(plain.pop("steps"), 1):
        step = _step(entry, f"{where}, step {number}")
        build_reducer(step)
        steps.append(step)
    try:
        return Recipe(**{**plain, "steps": tuple(steps)}, source=origin, raw=raw)
    except ValidationError as error:
        raise ConfigError(explain(error, where, Recipe, plain, hide=_PROVENANCE)) from None


def build_reducer(step: Step) -> Reducer:
    """Return the reducer of a step, with its options; raises ConfigError or UnknownNameError that names the step."""
    where = step.where or f"reducer '{step.reducer}'"
    try:
        cls = registry.reducer_class(step.reducer)
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}: {error}") from None
    _check_place(step, cls, where)
    budget = sorted({"ratio", "keep"} & set(step.options))
    if budget and issubclass(cls, DecodeReducer):
        raise ConfigError(f"{where}: {budget[0]} has no effect on '{step.reducer}', whose own parameters say how much.")
    try:
        return cls(**step.options)
    except ValidationError as error:
        raise ConfigError(explain(error, where, cls, step.options, also=_STEP_KEYS)) from None


def resolve_layers(at: At, num_layers: int) -> tuple[int, ...]:
    """Return the layer indices of a place in a decoder, or a vision encoder, of `num_layers` layers; () for the cache.

    A fraction of the depth is rounded half up, is at least 1, at most the last layer, and in a list more than the one
    before. Raises ConfigError where a layer is out of range.
    """
    if at.encoder == "all":
        return tuple(range(num_layers))
    given: Sequence[int | float] = at.layers or ()
    if at.projector or at.keys:
        given = (0,)
    elif at.layer is not None or isinstance(at.encoder, int):
        given = (at.layer if at.layer is not None else at.encoder,)  # type: ignore[assignment]
    out: list[int] = []
    for layer in given:
        index = layer
        if isinstance(layer, float):
            index = min(max(1, math.floor(round(layer * num_layers, 9) + 0.5)), num_layers - 1)
            index = max(index, out[-1] + 1) if out else index
        if index >= num_layers or (out and index <= out[-1]):
            stack = "encoder" if at.encoder is not None else "decoder"
            raise ConfigError(
                f"{at}: this model's {stack} has {num_layers} layers, so an index is from 0 to {num_layers - 1} and "
                f"a list ascends; {layer} is layer {index} here."
            )
        out.append(int(index))
    return tuple(out)


def resolve_steps(recipe: Recipe, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Return `resolve_layers` of each step, () for encoder steps; raises ConfigError where a step starts too early."""
    out: list[tuple[int, ...]] = []
    last = 0
    for step in recipe.steps:
        layers = () if step.at.place == "encoder" else resolve_layers(step.at, num_layers)
        if layers and layers[0] < last:
            raise ConfigError(
                f"{step.where}: steps run in ascending order of place, but in this model of {num_layers} layers it "
                f"starts at layer {layers[0]}, behind the step before, which reaches layer {last}."
            )
        last = layers[-1] if layers else last
        out.append(layers)
    return tuple(out)


def facts(recipe: Recipe) -> dict[str, Any]:
    """Return what tools ask of a method: `places`, `known_count`, `reads_text` and `modalities`."""
    classes = [registry.reducer_class(step.reducer) for step in recipe.steps]
    modalities = frozenset.intersection(*(cls.modalities for cls in classes))
    return {
        "places": [str(step.at) for step in recipe.steps],
        "known_count": all(cls.known_count for cls in classes),
        "reads_text": any(cls.reads_text for cls in classes),
        "modalities": [name for name in ("image", "video", "audio") if name in modalities],
    }


def describe(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's recipe and facts as plain data; raises like `load_recipe`."""
    recipe = load_recipe(source)
    plain = recipe.model_dump(include={"method", "summary", "paper", "positions", "params"})
    steps = [_flat(step) for step in recipe.steps]
    return {**plain, "steps": steps, "facts": facts(recipe), "source": recipe.source, "yaml": recipe.to_yaml()}


def _flat(step: Step) -> dict[str, Any]:
    kept = {} if step.kept is None else {"kept": list(step.kept)}
    return {"reducer": step.reducer, "at": step.at.to_yaml(), **kept, **step.options}


def _step(entry: Mapping[str, Any], where: str) -> Step:
    known = {key: value for key, value in entry.items() if key in _STEP_KEYS}
    options = {key: value for key, value in entry.items() if key not in _STEP_KEYS}
    try:
        return Step(**known, options=options, where=where)
    except ValidationError as error:
        raise ConfigError(explain(error, where, Step, entry, hide=("options", "where"))) from None


def _check_place(step: Step, cls: type[Reducer], where: str) -> None:
    allowed: set[str] = set(cls.places)
    if step.at.layer == 0 and isinstance(step.at.layer, int) and "projector" in allowed:
        # Layer 0 is the projector said otherwise: the cut is the same.
        allowed.add("layer")
    if step.at.place not in allowed:
        raise ConfigError(
            f"{where}: the reducer '{step.reducer}' cannot act at {step.at}. "
            f"Its places are: {', '.join(sorted(cls.places))}."
        )
    if step.at.cache is not None and (step.at.cache == "decode") != issubclass(cls, DecodeReducer):
        when = (
            "while decoding: write {cache: decode}" if issubclass(cls, DecodeReducer) else "at the end of the prefill"
        )
        raise ConfigError(f"{where}: the reducer '{step.reducer}' cannot act at {step.at}; it acts {when}.")
