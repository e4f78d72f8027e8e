"""Turns a recipe into a plan for one model, and says why a recipe does not fit."""

from __future__ import annotations

from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.planning.keys import key_cuts
from mllm_squeeze.planning.modality import fitting_steps
from mllm_squeeze.planning.signals import check_inside, check_needs
from mllm_squeeze.recipe.recipe import Recipe, resolve_steps
from mllm_squeeze.recipe.steps import At
from mllm_squeeze.reducers.base import DecodeReducer, Reducer


def make_plan(recipe: Recipe, parts: ModelParts, text_encoder: PromptEncoder | None = None) -> Plan:
    """Return the cuts of a recipe on a model.

    text_encoder: what compares words and pictures in its space, None without one.

    Raises:
        ConfigError: a layer is out of range, or a cut at layer 0 asks for the attention of the layer before.
        UnsupportedModelError: the model lacks a part that the recipe needs; the message names it.
    """
    places = resolve_steps(recipe, len(parts.layers))
    if parts.cross_attention or any(step.at.keys for _, step in fitting_steps(recipe, parts)):
        return Plan((), recipe.positions == "repack", keys=key_cuts(recipe, parts, places))
    cuts: list[PlannedCut] = []
    encoder = decode = None
    blocks: tuple[int, ...] = ()
    for number, step in fitting_steps(recipe, parts):
        reducer, layers = step.built, places[number]
        if step.at.place == "encoder":
            blocks = _encoder_blocks(recipe, step.at, parts)
            encoder = PlannedCut(number, recipe.method, 0, reducer, step.amount)
            check_inside(recipe.method, encoder)
        elif step.at.place == "cache":
            _check_decode(recipe, step.at, parts, reducer)
            decode = PlannedCut(number, recipe.method, 0, reducer)
        else:
            planned = [
                PlannedCut(number, recipe.method, layer, reducer, step.amount, stage, len(layers), text_encoder)
                for stage, layer in enumerate(layers)
                # Of those that fall on one layer the last says what is left.
                if layer not in layers[stage + 1 :]
            ]
            for cut in planned:
                _check_shared(recipe, cut, parts)
                check_needs(recipe.method, cut, parts)
            cuts += planned
    # Steps for other modalities stand in any order; a pass meets cuts by their layer.
    cuts.sort(key=lambda cut: cut.layer)
    plan = Plan(tuple(cuts), recipe.positions == "repack", encoder, blocks, decode)
    _check_whole_tower(recipe, plan)
    return plan


def why_not(recipe: Recipe, parts: ModelParts) -> str | None:
    """Return why a recipe does not fit a model, None where it fits."""
    try:
        make_plan(recipe, parts)
    except (ConfigError, UnsupportedModelError) as error:
        return str(error)
    return None


def _encoder_blocks(recipe: Recipe, at: At, parts: ModelParts) -> tuple[int, ...]:
    """Return the blocks that an encoder step names, () for all of them; raises where one cannot be served."""
    _check_encoder(recipe, parts)
    if at.encoder == "all":
        return ()
    last = parts.feature_block or 0
    if not isinstance(at.encoder, int) or not 1 <= at.encoder <= last:
        raise ConfigError(
            f"'{recipe.method}' acts in front of encoder block {at.encoder}; this encoder can be reduced in front of "
            f"block 1 to {last}, the feature layer. Give one of those, or 'all'."
        )
    return (at.encoder,)


def _check_whole_tower(recipe: Recipe, plan: Plan) -> None:
    """Check that no step reads signals of a tower that another step shortens: they would be of other patches."""
    if plan.encoder is not None and plan.encoder_needs:
        read = ", ".join(sorted(str(need) for need in plan.encoder_needs))
        raise UnsupportedModelError(
            f"'{recipe.method}' reduces tokens inside the vision encoder and reads {read} there for a later step, "
            "which then speaks of other patches. Let one step do both, or read states: score: norm.",
            avoid=[],
        )


def _check_decode(recipe: Recipe, at: At, parts: ModelParts, reducer: Reducer) -> None:
    if not isinstance(reducer, DecodeReducer):
        raise ConfigError(
            f"'{recipe.method}' reduces the cache at {at}; only reducers that work step by step, children of "
            "DecodeReducer, are served, at {cache: decode}."
        )
    if reducer.layer >= len(parts.layers):
        raise ConfigError(
            f"'{recipe.method}' looks at few visual tokens from layer {reducer.layer} on while decoding; this model "
            f"has {len(parts.layers)} layers, so the layer must be between 1 and {len(parts.layers) - 1}."
        )
    if find_attention(parts.layers[reducer.layer - 1]) is None:
        raise UnsupportedModelError(
            f"'{recipe.method}' reads the attention of layer {reducer.layer - 1} while decoding, which has none. "
            "Choose another layer."
        )


def _check_encoder(recipe: Recipe, parts: ModelParts) -> None:
    row = parts.row
    reasons = [
        (row.tower != "batched", "its vision encoder packs the patches of all images into one row"),
        (not row.per_token, "its projector merges several patches into one token"),
        (parts.blocks is None or parts.projector is None, "its encoder blocks or projector were not found"),
        (not isinstance(parts.feature_layers, int), "it concatenates features of several encoder layers"),
    ]
    for bad, reason in reasons:
        if bad:
            raise UnsupportedModelError(
                f"'{recipe.method}' merges tokens inside the vision encoder, which does not fit '{row.model_type}': "
                f"{reason}. Use a method that acts at the projector or in the LLM.",
                avoid=[],
            )


def _check_shared(recipe: Recipe, cut: PlannedCut, parts: ModelParts) -> None:
    first = min(parts.kv_sources.values(), default=len(parts.layers))
    if cut.layer > first:
        raise ConfigError(
            f"'{recipe.method}' cuts at layer {cut.layer}, but the last {len(parts.kv_sources)} layers of this model "
            f"borrow keys and values from layer {first} on, so layer must be at most {first}."
        )
