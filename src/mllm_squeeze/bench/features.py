"""Feeds a model image features that were computed apart, also where its release of transformers has no word for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def take_features(model: Any) -> None:
    """Let the inner model take `mm_encoder_outputs`, as newer releases of transformers do by themselves.

    The class of this one model changes, nothing else: where features are given, it finds them instead of encoding.
    """
    inner = model.model
    if "mm_encoder_outputs" not in inspect.signature(inner.forward).parameters:
        inner.__class__ = _taking(type(inner))


def _taking(base: Any) -> Any:
    class Taking(base):  # type: ignore[misc]
        _given: Any = None

        def forward(self, *args: Any, mm_encoder_outputs: Any = None, **kwargs: Any) -> Any:
            if not mm_encoder_outputs:
                return super().forward(*args, **kwargs)
            self._given = mm_encoder_outputs["image"]
            try:
                # Asks for pictures, which nobody looks at.
                return super().forward(*args, **{**kwargs, "pixel_values": torch.empty(1)})
            finally:
                self._given = None

        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_image_features(*args, **kwargs) if self._given is None else self._given

    Taking.__name__ = Taking.__qualname__ = base.__name__
    return Taking
