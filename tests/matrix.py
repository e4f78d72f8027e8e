"""Which methods meet which families, inputs and attention implementations: the lists behind the contract tests.

All of them follow from facts: ways from recipes (`ways`), families from `tiny.FAMILIES` and the table of families. A
new method joins by its recipe, a new family by one entry in `tiny.FAMILIES`; there is no line to write here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from zlib import crc32

import pytest
import transformers
from packaging.version import Version
from torch import Tensor

import mllm_squeeze as squeeze
import text_space
import tiny
import ways
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.family.structure import find_attention, find_parts
from mllm_squeeze.family.table import TABLE, FamilyRow
from mllm_squeeze.upstream.modules import is_packed
from tiny.parts import AFTER
from tiny.prompts import KINDS, collate, sample
from ways import changed, method, pick

IMPLEMENTATIONS = ("sdpa", "eager")
FAMILIES = tiny.CORE_FAMILIES
RECENT = Version(transformers.__version__) >= Version("5.23")
# Older releases repeat the pictures of a prompt for beams one by one, so each beam sees others where there are several.
BEAM_PROMPT = "two_images" if RECENT else "image"
BEAM_BATCH = ("two_images", "image") if RECENT else ("image", "text")
# One plain family, one with separators among its visual tokens; one with M-RoPE, one that injects features later too.
ONE_AXIS = ("llava", "llava_next")
THREE_AXES = ("qwen2_5_vl", "qwen3_vl")
REPRESENTATIVE = (*ONE_AXIS, *THREE_AXES)
# The same model as LLaVA-NeXT until a video comes.
_TWINS = {("llava_next_video", "image"), ("llava_next_video", "two_images")}

ALL = ways.shipped()
# What compares words and pictures in the space of a text encoder is proved with one (test_text_encoder.py).
WAYS = ways.representatives(name for name in ALL if not method(name).wants_text_encoder)
# The ways that meet every family, in every implementation: before the LLM, at one layer, at several, with merging.
CORE = (pick("before", repacks=True, merges=False), pick("layer", merges=False), pick("layers", merges=False))
CORE += (pick("layers", merges=True),)
MERGED_BEFORE = pick("before", merges=True)
KEEPS_POSITIONS = pick("before", repacks=False, merges=False)
EVERYWHERE = (*CORE, MERGED_BEFORE)
QUICK = {("llava", name) for name in CORE if not method(name).merges} | {("qwen2_5_vl", CORE[1])}
QUICK |= {("qwen3_vl", CORE[0]), ("qwen3_vl", CORE[3]), ("llava_next", MERGED_BEFORE)}


def fits(name: str, family: str, kind: str) -> bool:
    """Say whether a method must work on this input of this family.

    Towers pool the frames of a video, but where their `tower_to_llm` is "identity", so the encoder leaves videos whole.
    """
    if misfit(name, family) or not modalities(family, kind) & set(method(name).modalities):
        return False
    whole = row_of(family).tower_to_llm == "identity"
    return "encoder" not in method(name).way.places or "video" not in kind or whole


def misfit(name: str, family: str) -> str | None:
    """Return why a method cannot work on a family, by the facts of both; None where it must.

    The planner must come to the same answer (test_errors.py, families/test_family_refusals.py). What layers of a family
    lack is told by `families.proof`; those of the core lack nothing.
    """
    way, row = method(name).way, row_of(family)
    taken = {modality for kind in tiny.kinds(family) for modality in modalities(family, kind)}
    if not taken & set(method(name).modalities):
        return "reduces"
    if "encoder" in way.places and (row.tower != "batched" or not row.per_token):
        return "inside the vision encoder"
    if "encoder" in way.roads and (row.tower_to_llm in ("queries", "overlap", "no_encoder") or not has_blocks(family)):
        return "vision encoder"
    if "sound" in way.roads and not has_ears(family):
        return "audio encoder"
    if "pushes" in way.roads and not (has_projector(family) and (row.per_token or row.tower_to_llm == "block_merge")):
        return "its projector"
    if "cls" in way.roads and not row.cls:
        return "no CLS token"
    return None


@cache
def has_projector(family: str) -> bool:
    """Say whether the library finds what maps the features of a family to those that the LLM gets."""
    try:
        return find_parts(tiny.load(family).model).projector is not None
    except SqueezeError:  # a model that is refused
        return False


@cache
def has_blocks(family: str) -> bool:
    """Say whether the library finds the blocks of a family's vision encoder."""
    try:
        return find_parts(tiny.load(family).model).blocks is not None
    except SqueezeError:  # a model that is refused
        return False


@cache
def has_ears(family: str) -> bool:
    """Say whether a family encodes sound in a method of its own, recordings one after the other."""
    try:
        parts = find_parts(tiny.load(family).model)
    except SqueezeError:  # a model that is refused
        return False
    attention = None if parts.sound_block is None else find_attention(parts.sound_block)
    return attention is not None and is_packed(attention) and hasattr(parts.base, "get_audio_features")


def has(family: str, kind: str) -> bool:
    """Say whether the family takes this kind of input."""
    return kind in tiny.kinds(family)


def modalities(family: str, kind: str) -> set[str]:
    """Return the modalities of the spans of a prompt; a family whose table names no video shows it as images."""
    shown = {word for word in ("image", "video", "audio") if word in kind}
    return {word if word in row_of(family).modalities else "image" for word in shown}


@cache
def row_of(family: str) -> FamilyRow:
    """Return the row that a tiny model stands for: that of its model_type, or of both where its tower has a row too."""
    if family in FAMILIES:
        return TABLE[family]
    config = tiny.load(family).model.config
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return TABLE.get(f"{config.model_type}+{tower}") or TABLE[config.model_type]


def met(name: str, families: Sequence[str]) -> tuple[str, ...]:
    """Return the families, of these, that a way is tried on: all for a few, else one of one axis and one of three.

    Which of them follows from the name alone, so that no other method changes it.
    """
    if name in EVERYWHERE or name not in ALL:
        return tuple(families)
    out = []
    for group in (ONE_AXIS, THREE_AXES):
        rest = [f for f in FAMILIES if TABLE[f].tower == TABLE[group[0]].tower and f not in group]
        fitting = [f for f in (*group, *rest) if f in families and misfit(name, f) is None]
        preferred = [f for f in fitting if f in group] or fitting
        out += preferred[crc32(name.encode()) % len(preferred) :][:1] if preferred else []
    return tuple(out)


def cells(
    methods: Sequence[str] = WAYS,
    families: Sequence[str] = FAMILIES,
    kinds: Sequence[str] = ("image", "video"),
    implementations: Sequence[str] = ("sdpa",),
) -> list[Any]:
    """Return pytest parameters (family, method, kind, implementation) that fit; see `met` for the families.

    A way that does not meet all families is tried in the first implementation only.
    """
    out = []
    for family in families:
        for name in methods:
            if family not in met(name, families):
                continue
            for kind in kinds:
                if not has(family, kind) or not fits(name, family, kind) or (family, kind) in _TWINS:
                    continue
                for implementation in implementations if name in EVERYWHERE else implementations[:1]:
                    out.append(cell(family, name, kind, implementation))
    return out


def cell(family: str, name: str, kind: str, implementation: str) -> Any:
    """Return one parameter, marked where it belongs to the quick ones."""
    marks = [pytest.mark.quick] if (family, name) in QUICK and implementation == "sdpa" else []
    return pytest.param(family, name, kind, implementation, id=f"{family}-{name}-{kind}-{implementation}", marks=marks)


def misfits(kinds: Sequence[str]) -> list[Any]:
    """Return the parameters of `cells` that do not fit, of each way and each family."""
    return [
        cell(family, name, kind, "sdpa")
        for family in FAMILIES
        for name in WAYS
        for kind in kinds
        if has(family, kind) and not fits(name, family, kind) and (family, kind) not in _TWINS
    ]


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
def applied(model: Any, name: str, **changes: Any) -> Iterator[Any]:
    """Apply a method with the parameters of the tests, changed by `changes`, and a text encoder where it wants one."""
    given = text_space.encoder(method(name).space) if method(name).wants_text_encoder else None
    with squeeze.applied(model, name, text_encoder=given, **changed(method(name).params, changes)) as handle:
        yield handle


def repacks(handle: Any) -> bool:
    """Say whether survivors stand at consecutive positions: the recipe says so and positions have one axis."""
    return handle.recipe.positions == "repack" and not hasattr(handle.model.model, "get_rope_index")


def merged(name: str, cuts: Sequence[Any], states: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
    """Return the states that the oracle writes behind each cut of a method that merges, None for all others."""
    return {c.layer: states[c.layer] for c in cuts} if method(name).merges else None


def even_batch(t: tiny.TinyModel) -> tuple[tiny.Inputs, list[tiny.Inputs]]:
    """Return two prompts of the same length with one and two pictures, as a batch without padding, and alone."""
    long = sample(t.family, *KINDS["two_images"])
    short = sample(t.family, *KINDS["image"])
    fill = tuple(40 + n % 50 for n in range(len(long.ids) - len(short.ids)))
    short = sample(t.family, *KINDS["image"], tail=(*AFTER, *fill))
    return collate(t.family, [short, long]), [collate(t.family, [short]), collate(t.family, [long])]
