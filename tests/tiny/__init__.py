"""Tiny random models of the real HuggingFace classes, with prompts: no weights, no network, no processor.

A new family joins by one entry in a `*_line.py` table; everything else is derived from it.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import transformers
from torch import Tensor

from tiny.audio_line import AUDIO_LINE
from tiny.code_line import CODE_LINE
from tiny.gemma_line import GEMMA_LINE
from tiny.glm_line import GLM_LINE
from tiny.grid_line import GRID_LINE
from tiny.idefics_line import IDEFICS_LINE
from tiny.llava_line import LLAVA_LINE
from tiny.misc_line import MISC_LINE
from tiny.mistral_line import MISTRAL_LINE
from tiny.moe_line import MOE_LINE
from tiny.muse_line import MUSE_LINE
from tiny.ocr_line import OCR_LINE
from tiny.parts import Family
from tiny.plain_line import PLAIN_LINE
from tiny.prompts import KINDS, Batch, Inputs, Turn, collate, kinds_of, make_batch, make_turn, sample
from tiny.query_line import QUERY_LINE
from tiny.qwen_line import QWEN_LINE
from tiny.sparse_line import SPARSE_LINE
from tiny.speech_line import SPEECH_LINE
from tiny.tile_line import TILE_LINE

__all__ = [
    "ALL_FAMILIES",
    "CORE_FAMILIES",
    "FAMILIES",
    "Batch",
    "Inputs",
    "TinyModel",
    "Turn",
    "available",
    "fresh",
    "kinds",
    "load",
]

transformers.logging.set_verbosity_error()

CORE_FAMILIES = (*LLAVA_LINE, *QWEN_LINE)
FAMILIES: dict[str, Family] = {
    **LLAVA_LINE,
    **QWEN_LINE,
    **PLAIN_LINE,
    **MISC_LINE,
    **QUERY_LINE,
    **AUDIO_LINE,
    **TILE_LINE,
    **GLM_LINE,
    **MOE_LINE,
    **MISTRAL_LINE,
    **IDEFICS_LINE,
    **GEMMA_LINE,
    **GRID_LINE,
    **MUSE_LINE,
    **SPARSE_LINE,
    **OCR_LINE,
    **CODE_LINE,
    **SPEECH_LINE,
}


def available(name: str) -> bool:
    """Say whether the installed transformers can run this family, and whether the packages are here that it needs."""
    family = FAMILIES[name]
    here = all(importlib.util.find_spec(module) for module in family.modules)
    there = not family.wants or hasattr(transformers, family.wants)
    return here and there and transformers.__version__ not in family.broken


# Those that the installed transformers has, with the packages that they need.
ALL_FAMILIES = tuple(name for name in FAMILIES if available(name))


@dataclass(frozen=True)
class TinyModel:
    """A model and its prompts by kind ("image", "video", "text" ... see `prompts.KINDS`), those it has."""

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


def kinds(name: str) -> list[str]:
    """Return the kinds of prompt that this family takes, without building its model."""
    return kinds_of(FAMILIES[name])


def _build(name: str) -> TinyModel:
    family = FAMILIES[name]
    inputs = {kind: collate(family, [sample(family, *KINDS[kind])]) for kind in kinds_of(family)}
    return TinyModel(name, family.model(), inputs, family)


@functools.cache
def load(name: str) -> TinyModel:
    """Return the tiny model of this name, built once per process; a test leaves it as it was."""
    return _build(name)


def fresh(name: str) -> TinyModel:
    """Return a tiny model of this name with the same weights, built anew."""
    return _build(name)
