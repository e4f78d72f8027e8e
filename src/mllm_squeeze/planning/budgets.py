"""Another budget of a method whose hooks are on the model: the plan that the same hooks serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.signals.sources import Sources, chooses_rows
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.planning.fit import make_plan
from mllm_squeeze.recipe.recipe import Recipe


def plan_like(base: Plan, recipe: Recipe, parts: ModelParts, text_encoder: PromptEncoder | None) -> Plan:
    """Return the plan of a recipe, which the hooks of another plan serve.

    Raises:
        ConfigError: the recipe acts elsewhere, or reads something else, than what the hooks were put on for.
        UnsupportedModelError: see `make_plan`.
    """
    plan = replace(make_plan(recipe, parts, text_encoder), base=base)
    if _hooked(plan, parts) != _hooked(base, parts):
        raise ConfigError(
            f"This budget makes '{recipe.method}' act at other places, or read other signals, than it was applied for, "
            "and no hook is put on or taken off for one request. Use handle.switch() with it."
        )
    return plan


def _hooked(plan: Plan, parts: ModelParts) -> tuple[Any, ...]:
    """Return all of a plan that decides which hooks are on a model."""
    sources = Sources(plan, parts)
    return (
        plan.first,
        plan.repack,
        plan.needs,
        plan.encoder_needs,
        plan.encoder is None,
        plan.encoder_blocks,
        None if plan.decode is None else plan.decode.reducer,
        [chooses_rows(cut) for cut in plan.cuts],
        len(plan.keys),
        sources.last,
        sources.previewed,
    )
