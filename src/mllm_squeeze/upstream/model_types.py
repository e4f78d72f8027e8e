"""The model types that transformers itself calls multimodal."""

from __future__ import annotations

_MAPPINGS = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def multimodal_types() -> set[str]:
    """Return the model types that the installed release names in its mappings of multimodal models."""
    from transformers.models.auto import modeling_auto

    return {name for mapping in _MAPPINGS for name in getattr(modeling_auto, mapping, {})}
