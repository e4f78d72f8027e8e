"""Tiny random models of the real HuggingFace classes, with prompts: no weights, no network, no processor.

A new family joins by one entry in a `*_line.py` table; everything else is derived from it.
"""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import transformers
from torch import Tensor

from tiny.llava_line import LLAVA_LINE
from tiny.parts import Family
from tiny.prompts import KINDS, Batch, Inputs, Turn, collate, make_batch, make_turn, sample
from tiny.qwen_line import QWEN_LINE

__all__ = ["FAMILIES", "Batch", "Inputs", "TinyModel", "Turn", "fresh", "load"]

transformers.logging.set_verbosity_error()

FAMILIES: dict[str, Family] = {**LLAVA_LINE, **QWEN_LINE}


@dataclass(frozen=True)
class TinyModel:
    """A model and its prompts by kind, "image", "video", "two_images", "image_video", "text" where it has them."""

    name: str
    model: Any
    inputs: dict[str, Inputs]
    family: Family

    def visual(self, inputs: Inputs) -> Tensor:
        """Bool (B, T), True where a token is visual."""
        ids = inputs["input_ids"]
        return functools.reduce(lambda a, b: a | b, [ids == i for i in self.family.visual_ids])

    def batch(self, kinds: tuple[str, ...] = ("image", "two_images", "text"), side: str = "left") -> Batch:
        """Return the prompts of these kinds as one padded batch, each also alone; their texts differ in length."""
        return make_batch(self.family, kinds, side)

    def turn(self, first: Inputs, answer: Tensor, *parts: int | str) -> Turn:
        """Return the second turn: `parts` are its tokens and pieces ("image:2"), answer (1, A) ended the first one."""
        return make_turn(self.family, first, answer, parts)

    def copy(self) -> TinyModel:
        """Return a twin with a model of its own, for tests that change or wrap it."""
        return TinyModel(self.name, copy.deepcopy(self.model), self.inputs, self.family)


def _build(name: str) -> TinyModel:
    family = FAMILIES[name]
    kinds = {k: v for k, v in KINDS.items() if family.video is not None or "video" not in k}
    inputs = {kind: collate(family, [sample(family, *parts)]) for kind, parts in kinds.items()}
    return TinyModel(name, family.model(), inputs, family)


@functools.cache
def load(name: str) -> TinyModel:
    """Return the tiny model of this name, built once per process; a test leaves it as it was."""
    return _build(name)


def fresh(name: str) -> TinyModel:
    """Return a tiny model of this name with the same weights, built anew."""
    return _build(name)
