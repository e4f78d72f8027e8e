"""Which steps of a recipe have something to do on a model: those that reduce what it takes."""

from __future__ import annotations

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.recipe.recipe import Recipe, facts
from mllm_squeeze.recipe.steps import Step


def fitting_steps(recipe: Recipe, parts: ModelParts) -> list[tuple[int, Step]]:
    """Return the steps that reduce something the model takes, each with its number from 0.

    A recipe may hold a rule for pictures and another for clips; on a model that takes pictures alone the second has
    nothing to do, which the report says.

    Raises:
        UnsupportedModelError: none of them does.
    """
    takes = set(parts.row.modalities)
    found = [(n, step) for n, step in enumerate(recipe.steps) if step.built.facts.modalities & takes]
    if not found:
        raise UnsupportedModelError(
            f"'{recipe.method}' reduces {', '.join(sorted(facts(recipe)['modalities']))} tokens; "
            f"'{parts.row.model_type}' takes {', '.join(parts.row.modalities)}. Use a method for those.",
            avoid=[],
        )
    return found
