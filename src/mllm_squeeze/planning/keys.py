"""Plans the steps that reduce keys which are attended to from outside, and says which steps cannot."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.planning.modality import fitting_steps
from mllm_squeeze.recipe.recipe import Recipe
from mllm_squeeze.recipe.steps import Step
from mllm_squeeze.reducers.base import Reducer
from mllm_squeeze.reducers.needs import Features


def key_cuts(recipe: Recipe, parts: ModelParts, places: Sequence[Sequence[int]]) -> tuple[PlannedCut, ...]:
    """Return the cuts of a recipe all of whose steps act on keys.

    places: decoder layers of each step. In cross-attention the keys are what stands in front of the LLM, so a step at
    the projector or at layer 0 acts on them; a Q-Former is named by `keys`, as the LLM gets its queries.

    Raises:
        ConfigError: a recipe acts on the keys of a Q-Former and elsewhere.
        UnsupportedModelError: nothing attends to image features from outside, or a step cannot act on them.
    """
    cuts = []
    for number, step in fitting_steps(recipe, parts):
        reducer, layers = step.built, places[number]
        if parts.cross_attention:
            _check_crossed(recipe, step, layers, reducer, parts)
        else:
            _check_queried(recipe, step, reducer, parts)
        cuts.append(PlannedCut(number, recipe.method, 0, reducer, step.amount))
    return tuple(cuts)


def _check_crossed(recipe: Recipe, step: Step, layers: Sequence[int], reducer: Reducer, parts: ModelParts) -> None:
    does = ""
    needs = _beyond_features(reducer)
    if step.at.encoder is not None:
        does = "merges tokens inside the vision encoder"
    elif step.at.cache is not None:
        does = "chooses entries of the cache while decoding"
    elif tuple(layers) != (0,):
        does = f"cuts at decoder layer {', '.join(map(str, layers))}"
    elif needs:
        does = f"reads {' and '.join(needs)}"
    elif parts.row.encoded and reducer.facts.reads_text:
        does = "reads the words of the prompt"
    if does:
        raise UnsupportedModelError(
            f"'{recipe.method}' {does}, which does not fit '{parts.row.model_type}': its pictures are no part of the "
            "LLM's sequence but keys of cross-attention layers, computed once from what the encoder gave. Use a method "
            "that acts in front of the LLM (at the projector or layer 0) and reads nothing of it.",
            avoid=[],
        )


def _check_queried(recipe: Recipe, step: Step, reducer: Reducer, parts: ModelParts) -> None:
    if parts.queries is None:
        raise UnsupportedModelError(
            f"'{recipe.method}' acts on keys, and in '{parts.row.model_type}' the visual tokens stand in the LLM's "
            "sequence: nothing attends to them from outside. Write at: projector."
        )
    if not step.at.keys:
        raise ConfigError(
            f"'{recipe.method}' acts on the keys of the Q-Former and at {step.at}, which cuts its queries. Make two "
            "recipes of it, and apply one."
        )
    if step.amount.by_row or step.amount.total is not None:
        raise ConfigError(
            f"{step.where or recipe.method}: {step.amount} speaks of prompts, and what the Q-Former attends to are "
            "pictures, whatever prompt they stand in. Give one ratio or keep."
        )
    needs = _beyond_features(reducer)
    if needs or reducer.facts.reads_text:
        raise UnsupportedModelError(
            f"'{recipe.method}' reads {' and '.join(needs) or 'the words of the prompt'}, which is not known in front "
            f"of the Q-Former of '{parts.row.model_type}'. Use a step that looks at the features alone, as "
            "methods at the projector may.",
            avoid=["attention", "text"],
        )


def _beyond_features(reducer: Reducer) -> list[str]:
    """Return what a rule reads besides states, which keys and words have as well."""
    return list(dict.fromkeys(need.phrase for need in reducer.needs() if not isinstance(need, Features)))
