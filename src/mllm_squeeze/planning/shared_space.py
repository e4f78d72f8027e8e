"""Can words and pictures be compared in one space, as a rule asks for it."""

from __future__ import annotations

from mllm_squeeze.engine.plan import PlannedCut, is_shared
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.planning.encoder_signals import check_encoder_need
from mllm_squeeze.recipe.recipe import Recipe
from mllm_squeeze.reducers.needs import Embedding
from mllm_squeeze.upstream.shared_space import state_width


def require_used(recipe: Recipe) -> None:
    """Check that a recipe reads the space of a text encoder, ahead of loading one.

    Raises:
        ConfigError: it does not.
    """
    needs = [need for step in recipe.steps for need in step.built.needs()]
    if not any(is_shared(need) for need in needs):
        raise ConfigError(
            f"text_encoder is given, and '{recipe.method}' compares nothing in the space of one. Leave it out, or "
            "use a step that does (score: {text_similarity: clip})."
        )


def check_embedding(method: str, cut: PlannedCut, need: Embedding, parts: ModelParts) -> None:
    """Check that words and pictures are to be had in the space that a rule asks for.

    Raises:
        UnsupportedModelError: there is no text encoder, and nothing may stand in; the vision tower gives no states; or
            they are not as wide as the encoder takes them.
    """
    if not is_shared(need):
        return
    if cut.text_encoder is None:
        if need.fallback:
            return
        raise UnsupportedModelError(
            f"'{method}' reads {need.phrase} (CLIP's), and no text model of that space is given. Give the one that was "
            "trained with the model's vision tower (text_encoder=, a CLIP or SigLIP model or its name), use the "
            "language model's own space (space: llm), or let that stand in (fallback: true).",
            avoid=[],
        )
    if need.raw and not cut.text_encoder.tells_tokens:
        raise UnsupportedModelError(
            f"'{method}' compares single words with patches, and the text encoder "
            f"({type(cut.text_encoder.space).__name__}) gives one vector for a whole text, or no linear projection of "
            "a patch. Give a CLIP model, or an object that has tokens(words) and patches(states) as well; or use the "
            "language model's own space (space: llm)."
        )
    if need.of == "text":
        return
    check_encoder_need(method, need, parts)
    if need.pooled:
        _check_pooled(method, cut.text_encoder, parts)
    assert parts.blocks is not None
    assert parts.feature_block is not None
    given, wanted = state_width(parts.blocks[parts.feature_block]), cut.text_encoder.image_width
    if None not in (given, wanted) and given != wanted:
        raise UnsupportedModelError(
            f"The text encoder takes patches of {wanted} channels, and the vision tower of '{parts.row.model_type}' "
            f"({type(parts.tower).__name__}) gives {given}: they were not trained together. Give the text model of "
            "that tower."
        )


def _check_pooled(method: str, encoder: PromptEncoder, parts: ModelParts) -> None:
    """Raise UnsupportedModelError where no vector of a whole picture is to be had."""
    reason = None
    if parts.row.tower == "packed":
        reason = f"the vision tower of '{parts.row.model_type}' packs the patches of all frames into one row"
    elif not parts.has_cls and not encoder.pools:
        reason = (
            f"the vision tower of '{parts.row.model_type}' has no CLS token, and the text encoder has no head that "
            "pools patches (SigLIP's, or `picture(states)` of an object of your own)"
        )
    if reason is not None:
        raise UnsupportedModelError(
            f"'{method}' compares whole frames with the words, and {reason}. Use a method that compares tokens.",
            avoid=[],
        )
