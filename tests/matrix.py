"""Which methods meet which families, inputs and attention implementations: the lists behind the contract tests.

A new method joins by one line in METHODS, a new family by one entry in `tiny.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers
from packaging.version import Version

import mllm_squeeze as squeeze
import tiny
from tiny.parts import AFTER
from tiny.prompts import KINDS, collate, sample

IMPLEMENTATIONS = ("sdpa", "eager")
FAMILIES = tiny.CORE_FAMILIES
RECENT = Version(transformers.__version__) >= Version("5.23")
# Older releases repeat the pictures of a prompt for beams one by one, so each beam sees others where there are several.
BEAM_PROMPT = "two_images" if RECENT else "image"
BEAM_BATCH = ("two_images", "image") if RECENT else ("image", "text")
# One plain family, one with separators among its visual tokens, one with M-RoPE, one that injects features later.
REPRESENTATIVE = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
# Encoders in which a token stays one token up to the LLM, and tokens of a tile stand in a batch row of their own.
_PER_TOKEN = ("llava", "llava_next", "llava_next_video", "llava_onevision")
# The same model as LLaVA-NeXT until a video comes.
_TWINS = {("llava_next_video", "image"), ("llava_next_video", "two_images")}
# Families whose video is a modality of its own; InternVL shows a video as images.
_VIDEO = ("llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Method:
    """A method as the tests apply it: parameters for four layers, and what it does that an oracle must know.

    merges: survivors carry merged states. decodes: it goes on cutting while decoding. exact: a span keeps the budget to
    the token, not only about. families, kinds: where it fits.
    """

    name: str
    params: dict[str, Any] = field(default_factory=lambda: {"ratio": 0.5})
    merges: bool = False
    decodes: bool = False
    exact: bool = True
    families: tuple[str, ...] = FAMILIES
    kinds: tuple[str, ...] = ("image", "video", "two_images", "image_video")


METHODS = {
    m.name: m
    for m in (
        Method("random"),
        Method("uniform"),
        Method("avgpool", merges=True, exact=False),
        Method("fastv", {"ratio": 0.5, "layer": 2}),
        Method("pyramiddrop", {"ratio": 0.75}),
        Method("sparsevlm", merges=True),
        Method("visionzip", merges=True),
        Method("divprune"),
        Method("dart", {"ratio": 0.5, "layer": 2}),
        Method("tome", merges=True, exact=False, families=_PER_TOKEN, kinds=("image", "two_images")),
        Method("vidcom2", exact=False, families=_VIDEO, kinds=("video", "image_video")),
        Method("dycoke", decodes=True, exact=False, families=_VIDEO, kinds=("video", "image_video")),
    )
}
# One method per way of working: before the LLM, at one layer by attention, at several layers, with merging.
CORE = ("divprune", "fastv", "pyramiddrop", "sparsevlm")
QUICK = {("llava", "fastv"), ("llava", "pyramiddrop"), ("llava", "divprune"), ("qwen2_5_vl", "fastv")}
QUICK |= {("qwen3_vl", "divprune"), ("qwen3_vl", "sparsevlm"), ("llava_next", "visionzip")}


def fits(method: str, family: str, kind: str) -> bool:
    """Say whether the method must work on this input of this family."""
    m = METHODS[method]
    return family in m.families and kind in m.kinds and has(family, kind)


def has(family: str, kind: str) -> bool:
    """Say whether the family takes this kind of input."""
    return "video" not in kind or tiny.FAMILIES[family].video is not None


def cells(
    methods: Sequence[str] = tuple(METHODS),
    families: Sequence[str] = FAMILIES,
    kinds: Sequence[str] = ("image", "video"),
    implementations: Sequence[str] = ("sdpa",),
    fit: bool = True,
) -> list[Any]:
    """Return pytest parameters (family, method, kind, implementation): the cells that fit, or those that do not."""
    out = []
    for family in families:
        for method in methods:
            for kind in kinds:
                if not has(family, kind) or fits(method, family, kind) != fit or (family, kind) in _TWINS:
                    continue
                for implementation in implementations:
                    quick = (family, method) in QUICK and implementation == "sdpa"
                    marks = [pytest.mark.quick] if quick else []
                    name = f"{family}-{method}-{kind}-{implementation}"
                    out.append(pytest.param(family, method, kind, implementation, id=name, marks=marks))
    return out


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Set an attention implementation for a while."""
    before = model.config._attn_implementation
    if before != implementation:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if before != implementation:
            model.set_attn_implementation(before)


@contextmanager
def applied(model: Any, method: str, **changes: Any) -> Iterator[Any]:
    """Apply a method with the parameters of the table, changed by `changes`."""
    params = METHODS[method].params | changes
    if "keep" in changes:
        params.pop("ratio", None)
    with squeeze.applied(model, method, **params) as handle:
        yield handle


def repacks(handle: Any) -> bool:
    """Say whether survivors stand at consecutive positions: the recipe says so and positions have one axis."""
    return handle.recipe.positions == "repack" and not hasattr(handle.model.model, "get_rope_index")


def even_batch(t: tiny.TinyModel) -> tuple[tiny.Inputs, list[tiny.Inputs]]:
    """Return two prompts of the same length with one and two pictures, as a batch without padding, and alone."""
    long = sample(t.family, *KINDS["two_images"])
    short = sample(t.family, *KINDS["image"])
    fill = tuple(40 + n % 50 for n in range(len(long.ids) - len(short.ids)))
    short = sample(t.family, *KINDS["image"], tail=(*AFTER, *fill))
    return collate(t.family, [short, long]), [collate(t.family, [short]), collate(t.family, [long])]
