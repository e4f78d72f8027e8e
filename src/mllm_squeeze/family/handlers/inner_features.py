"""Image features that a text model adds in front of inner layers by a mask over the prompt: they follow the cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.family.handlers.deepstack import add_features
from mllm_squeeze.upstream import injections


@dataclass(frozen=True)
class InnerFeatures:
    """Features (number of visual tokens, D) by decoder layer, and bool (B, T), where they belong."""

    by_layer: Mapping[int, Tensor]
    visual: Tensor

    def add(self, layer: int, hidden: Tensor, index: Tensor | None, valid: Tensor | None) -> Tensor:
        """Add a layer's features to the visual tokens that are left; hidden (B, M, D), index int64 (B, M)."""
        features = self.by_layer.get(layer)
        if features is None:
            return hidden
        if index is None:
            index = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
        return add_features(hidden, self.visual, features, index, valid)


def has_inner_features(decoder: nn.Module) -> bool:
    """True where the text model adds features in front of inner layers by a mask over the full prompt."""
    return injections.takes_inner_features(decoder)


def take_inner_features(kwargs: dict[str, Any]) -> tuple[dict[str, Any], InnerFeatures | None]:
    """Take such features out of a text model's arguments, so that the engine adds them (Granite 4 Vision)."""
    rest, features, visual = injections.split_inner_features(kwargs)
    if features is None or visual is None:
        return kwargs, None
    return rest, InnerFeatures(features, visual)
