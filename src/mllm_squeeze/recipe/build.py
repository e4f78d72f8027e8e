"""Builds the reducer of a step, and says what of the step does not fit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from mllm_squeeze import registry
from mllm_squeeze.amount import RULES
from mllm_squeeze.errors import ConfigError, UnknownNameError
from mllm_squeeze.recipe.rules import explain
from mllm_squeeze.reducers.base import DecodeReducer, Reducer
from mllm_squeeze.reducers.needs import Place

if TYPE_CHECKING:
    from mllm_squeeze.recipe.steps import Step

STEP_KEYS = ("reducer", "at", *RULES)
# The reducer of a step that names none: its options are parts.
PIPELINE = "pipeline"


def build_reducer(step: Step) -> Reducer:
    """Return the reducer of a step, with its options; raises ConfigError or UnknownNameError that names the step."""
    where = step.where or f"'{step.rule}'"
    try:
        cls = registry.reducer_class(step.reducer)
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}: {error}") from None
    _check_place(step, cls.places, issubclass(cls, DecodeReducer), where)
    for name in step.amount.given if issubclass(cls, DecodeReducer) else ():
        raise ConfigError(f"{where}: {name} has no effect on '{step.rule}', whose own parameters say how much.")
    try:
        reducer = cls(**step.options)
    except ValidationError as error:
        raise ConfigError(explain(error, where, cls, step.options, also=STEP_KEYS)) from None
    _check_place(step, reducer.facts.places, isinstance(reducer, DecodeReducer), where)
    _check_modality(step, reducer, where)
    _check_amount(step, reducer, where)
    return reducer


def _check_modality(step: Step, reducer: Reducer, where: str) -> None:
    """Raise ConfigError where a step names a modality that its rule cannot reduce."""
    if not reducer.facts.modalities:
        could = type(reducer)(**{**step.options, "modality": None}).facts.modalities
        raise ConfigError(
            f"{where}: '{step.rule}' reduces {' and '.join(sorted(could))} tokens, so modality: {reducer.modality} "
            "leaves it none. Name one of those, or leave modality out."
        )


def _check_amount(step: Step, reducer: Reducer, where: str) -> None:
    """Raise ConfigError where nothing says how much a step leaves, or what is asked for can never be had."""
    amount = step.amount
    if not amount.given and not reducer.facts.decides and not isinstance(reducer, DecodeReducer):
        # Its reducer would never be called.
        raise ConfigError(
            f"{where}: '{step.rule}' has no budget. Give ratio (the fraction removed), keep (tokens or fraction "
            "kept), total (tokens of one prompt) or, at several layers, kept; to let the user choose, add it to params "
            "and write ratio: ${ratio}."
        )
    if amount.fraction is not None and amount.fraction < reducer.least - 1e-9:
        raise ConfigError(
            f"{where}: {amount} asks '{step.rule}' for less than it can leave: {reducer.facts.why_more}. ratio "
            f"must be at most {1 - reducer.least:g} (keep at least {reducer.least:g})."
        )
    if step.at.encoder is not None and (amount.by_row or amount.total is not None):
        raise ConfigError(
            f"{where}: {amount} speaks of prompts, and the encoder sees all pictures of a batch at once. Give one "
            "ratio or keep, or act at the projector."
        )


def _check_place(step: Step, places: frozenset[Place], decodes: bool, where: str) -> None:
    allowed: set[str] = set(places)
    if step.at.layer == 0 and isinstance(step.at.layer, int) and "projector" in allowed:
        # Layer 0 is the projector said otherwise: the cut is the same.
        allowed.add("layer")
    if step.at.place not in allowed:
        raise ConfigError(
            f"{where}: '{step.rule}' cannot act at {step.at}. Its places are: {', '.join(sorted(places))}."
        )
    if step.at.cache is not None and (step.at.cache == "decode") != decodes:
        when = "while decoding: write {cache: decode}" if decodes else "at the end of the prefill"
        raise ConfigError(f"{where}: '{step.rule}' cannot act at {step.at}; it acts {when}.")
