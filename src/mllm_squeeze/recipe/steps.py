"""A step of a method: which reducer, where it acts and how much it leaves; and the order that steps keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, Literal

from pydantic import Field, InstanceOf, StrictFloat, StrictInt, model_validator

from mllm_squeeze.amount import RATIO_RULE, RULE_DECIDES, Amount
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.recipe.build import PIPELINE, build_reducer
from mllm_squeeze.recipe.rules import Strict, check_layers
from mllm_squeeze.reducers.base import MODALITIES, Reducer
from mllm_squeeze.reducers.needs import Place


class At(Strict):
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


class Step(Strict):
    """One reducer at one place.

    reducer: its name; without one the step is a pipeline of parts, and its options are those parts.
    amount: how much is left of the original tokens when it has run.
    options: the parameters of the reducer's class.
    where: which step of which recipe this is, for messages.
    """

    reducer: str = PIPELINE
    at: At
    amount: InstanceOf[Amount] = RULE_DECIDES
    options: dict[str, Any] = Field(default_factory=dict)
    where: str = Field(default="", exclude=True, repr=False)

    @model_validator(mode="after")
    def _one_fraction_per_layer(self) -> Step:
        kept, layers = self.amount.kept, self.at.layers
        if kept is None:
            return self
        if layers is None:
            raise ValueError("kept is a schedule over {layers: [...]}; at one place give ratio, keep or total")
        if len(kept) != len(layers):
            raise ValueError(f"kept has {len(kept)} fractions for {len(layers)} layers; give one for each")
        return self

    @property
    def rule(self) -> str:
        """What chooses, in a few words: the name of the reducer, or those of the parts, like "attention + top_k"."""
        if self.reducer != PIPELINE:
            return self.reducer
        given = (self.options.get(kind) for kind in ("segment", "score", "budget", "select", "merge", "parts"))
        words = [part if isinstance(part, str) else " | ".join(map(str, part)) for part in given if part]
        return " + ".join(words) or self.reducer

    @cached_property
    def built(self) -> Reducer:
        """The reducer; raises ConfigError or UnknownNameError that names the step."""
        return build_reducer(self)


def resolve_layers(at: At, num_layers: int) -> tuple[int, ...]:
    """Return the layer indices of a place in a decoder, or a vision encoder, of `num_layers` layers; () for the cache.

    A fraction of the depth is rounded half up, is at least 1, at most the last layer, and in a list more than the one
    before. Of a list of fractions that finds too few layers several may fall on one. Raises ConfigError where a layer
    is out of range.
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
            index = _nearest_layer(layer, num_layers)
            index = max(index, out[-1] + 1) if out else index
        if index >= num_layers or (out and index <= out[-1]):
            if num_layers > 1 and all(isinstance(one, float) for one in given):
                return tuple(_nearest_layer(one, num_layers) for one in given)
            raise ConfigError(_out_of_range(at, layer, out, num_layers))
        out.append(int(index))
    return tuple(out)


def _nearest_layer(fraction: float, num_layers: int) -> int:
    return min(max(1, math.floor(round(fraction * num_layers, 9) + 0.5)), num_layers - 1)


def _out_of_range(at: At, layer: int | float, before: Sequence[int], num_layers: int) -> str:
    """Return why `layer`, the next one after those of `before`, is none in a stack of `num_layers` layers."""
    stack = "encoder" if at.encoder is not None else "decoder"
    if isinstance(layer, float):
        return f"this model's {stack} of {num_layers} layers are too few for {at}. Give fewer layers, or others."
    if layer < num_layers:
        return (
            f"layers ascend, but in this model's {stack} of {num_layers} layers, of {at} layer {layer} is not behind "
            f"layer {before[-1]}. Give other layers."
        )
    return (
        f"this model's {stack} has {num_layers} layers, so {'layer' if at.encoder is None else 'encoder'} is an index "
        f"from 0 to {num_layers - 1}; got {layer}"
        + ("." if at.encoder is not None else ". A float between 0 and 1 is a fraction of the depth.")
    )


def meeting(steps: Sequence[Step]) -> Iterator[list[tuple[int, Step]]]:
    """Return for each modality the steps that reduce it, each with its number from 1; only those can meet a token."""
    for modality in MODALITIES:
        found = [(number, step) for number, step in enumerate(steps, 1) if modality in step.built.facts.modalities]
        if found:
            yield found


def check_order(steps: Sequence[Step]) -> None:
    """Raise ValueError unless the steps that one token meets ascend from encoder over projector and layers to cache.

    Equal places may repeat. Steps for pictures and steps for clips never meet, so they may stand in any order.
    """
    for place in ("encoder", "cache"):
        if sum(step.at.place == place for step in steps) > 1:
            raise ValueError(f"at most one step may act in the {place}; merge them into one")
    for (_, before), (number, after) in (pair for found in meeting(steps) for pair in pairwise(found)):
        stage, _, last = _extent(before.at)
        next_stage, first, _ = _extent(after.at)
        # An index and a fraction compare only once the depth of the model is known; see resolve_steps.
        known = type(first) is type(last) or first == 0
        if next_stage < stage or (next_stage == stage and known and first < last):
            raise ValueError(
                f"steps run in ascending order of place (encoder, projector, layers, cache prefill, cache decode), but "
                f"step {number} acts at {after.at}, after {before.at}; swap them"
            )


def check_totals(steps: Sequence[Step]) -> None:
    """Raise ValueError where a later step asks for more of a token's span than an earlier one leaves of it.

    Budgets are cumulative; what a step leaves of pictures says nothing of one for clips.
    """
    for found in meeting(steps):
        cutting = [(number, step.amount) for number, step in found if step.at.place != "cache"]
        for (_, before), (number, after) in combinations(cutting, 2):
            _check_pair(before, after, number)


def _check_pair(before: Amount, after: Amount, number: int) -> None:
    for (unit, earlier), (other, later) in _row_by_row(before, after):
        if unit == other and later > earlier + 1e-9:
            raise ValueError(
                f"budgets count from the original tokens, so a later step leaves no more than an earlier one; "
                f"step {number} keeps {later:.4g}, after a step that keeps {earlier:.4g}. {RATIO_RULE}"
            )


def _row_by_row(before: Amount, after: Amount) -> Iterator[tuple[tuple[str, float], tuple[str, float]]]:
    """Return what two steps leave in each row; one number stands for all rows."""
    rows = max(len(before.left), len(after.left))
    pair = [amount.left * (rows if len(amount.left) == 1 else 1) for amount in (before, after)]
    # Where two lists differ in length, one of them will not fit the batch.
    return zip(*pair, strict=False)


def _extent(at: At) -> tuple[int, int | float, int | float]:
    """Return the stage of a place, and the first and last index in it."""
    if at.encoder is not None:
        return (0, 0, 0) if at.encoder == "all" else (0, at.encoder, at.encoder)
    if at.cache is not None:
        return (2, 0, 0) if at.cache == "prefill" else (2, 1, 1)
    if at.layers is not None:
        return 1, at.layers[0], at.layers[-1]
    layer = at.layer or 0
    return 1, layer, layer
