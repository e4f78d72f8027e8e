"""Model types that have no row, as nothing in them can be cut: what is said of each, on models without weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto import configuration_auto, modeling_auto

import mllm_squeeze as squeeze
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.refused import REASONS
from mllm_squeeze.family.table import TABLE

pytestmark = pytest.mark.quick
CLASSES = {
    name: cls
    for mapping in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    for name, cls in getattr(modeling_auto, mapping, {}).items()
}


def model_of(name: str) -> Any:
    """Return a model of this type as its config is by default, on the meta device."""
    if name not in CLASSES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        config = configuration_auto.CONFIG_MAPPING[name]()
    except ValueError as error:  # older releases have no default for what is made of two models
        pytest.skip(f"transformers {transformers.__version__} builds no {name} by default: {error}")
    with torch.device("meta"):
        return getattr(transformers, CLASSES[name])(config)


@pytest.mark.parametrize("name", sorted(REASONS))
def test_it_is_refused_with_what_is_so_about_it(name: str) -> None:
    model = model_of(name)
    said = f"'{name}' .* cannot be squeezed: {re.escape(REASONS[name])}"
    with pytest.raises(UnsupportedModelError, match=said):
        squeeze.apply(model, "divprune")
    with pytest.raises(UnsupportedModelError, match=said):
        squeeze.check(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert ("encoder-decoder" in REASONS[name]) == model.config.is_encoder_decoder


def test_a_type_has_a_row_or_a_reason() -> None:
    assert not set(REASONS) & set(TABLE)
    missing = set(REASONS) - set(CLASSES)
    assert not missing or Version(transformers.__version__) < Version("5.24"), missing
