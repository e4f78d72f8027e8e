"""The way that an experiment finds from encoder tokens to LLM tokens is the one that the rows of families say."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mllm_squeeze as squeeze
import tiny
from families import proof
from families.test_encoder_places import assert_makers, cells, leaf_behind, one_hot
from mllm_squeeze.engine.encoder.call import item_lengths
from mllm_squeeze.engine.encoder.seen_way import SeenWays
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import find_parts
from mllm_squeeze.family.tower_to_llm import to_llm_tokens
from mllm_squeeze.upstream.outputs import projected
from mllm_squeeze.upstream.prompts import flat, vision_inputs

# Whose rows leave the way to the experiment.
SEEN = tuple(
    name
    for name in proof.HERE
    if (parts := find_parts(tiny.load(name).model)).blocks is not None and parts.row.tower_to_llm == "none"
)


def encoded(family: str, kind: str) -> tuple[Any, Any, list[int], Tensor, Tensor, Tensor, Callable[..., Any]]:
    """Run the feature method of a family once, with what its last block gives as a leaf.

    Returns (parts, inputs, lengths, features, leaf, numbers, again): numbers of the encoder's patches, one-hot, for all
    of its tokens in order, with zeros for those that are no patches.
    """
    t = tiny.load(family)
    parts = find_parts(t.model)
    method: Callable[..., Any] = getattr(parts.base, f"get_{modality_of(kind)}_features")
    given = {k: v for k, v in t.inputs[kind].items() if k in inspect.signature(method).parameters}
    assert parts.blocks is not None and parts.feature_block is not None
    with leaf_behind(parts.blocks[parts.feature_block]) as leaves:
        output = method(**given)
    (leaf,) = leaves
    lengths, features = item_lengths(output, parts.row.late), projected(output, parts.row.late)
    assert lengths is not None and features is not None
    inputs = vision_inputs(modality_of(kind), flat(method, (), given))
    numbers = one_hot(parts, leaf)
    states = leaf if leaf.ndim == 3 else leaf[None]
    every = torch.zeros(states.shape[0] * states.shape[1], numbers.shape[-1])
    patches = parts.patches(torch.arange(len(every)).view(states.shape[:2])).flatten()
    every[patches] = numbers.reshape(-1, numbers.shape[-1])
    joined = torch.cat([item.reshape(-1, item.shape[-1]) for item in features])
    return parts, inputs, lengths, joined, leaf, every, lambda: method(**given)


def modality_of(kind: str) -> str:
    return "video" if kind == "video" else "image"


@pytest.mark.parametrize(("family", "kind"), cells())
def test_an_experiment_finds_what_the_row_says(family: str, kind: str) -> None:
    parts, inputs, lengths, _, leaf, every, again = encoded(family, kind)
    by_row = to_llm_tokens(parts, modality_of(kind), inputs, lengths, one_hot(parts, leaf), 0.0)
    found = SeenWays(parts).carry(again, modality_of(kind), inputs, lengths, every, 0.0)
    for mine, theirs in zip(found, by_row, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("family", "kind"), cells(SEEN))
def test_an_experiment_finds_the_patches_that_make_a_token(family: str, kind: str) -> None:
    parts, inputs, lengths, features, leaf, every, again = encoded(family, kind)
    found = SeenWays(parts).carry(again, modality_of(kind), inputs, lengths, every, 0.0)
    assert_makers(parts, features, leaf, torch.cat(found))
    with squeeze.applied(tiny.load(family).model, "visionzip", keep=6) as handle:
        proof.forward(tiny.load(family), tiny.load(family).inputs[kind])
        assert handle.report().visual_after < handle.report().visual_before


def test_the_block_that_sees_the_whole_picture_is_read() -> None:
    """Of two blocks the first has windows; without windows it is the second to last."""
    assert find_parts(tiny.load("muse_glimmer").model).saliency_block == 1
    plain = find_parts(tiny.load("hunyuan_vl").model)
    assert plain.blocks is not None
    assert plain.saliency_block == len(plain.blocks) - 2


def test_a_size_is_tried_once_and_another_size_anew() -> None:
    ways = SeenWays(find_parts(tiny.load("muse_glimmer").model))
    runs: list[int] = []

    def counted(again: Callable[[], Any]) -> Any:
        runs.append(1)
        return again()

    for kind, times in (("image", 1), ("two_images", 2), ("image", 2)):
        _, inputs, lengths, _, _, every, again = encoded("muse_glimmer", kind)
        run = functools.partial(counted, again)
        once = ways.carry(run, "image", inputs, lengths, every, 0.0)
        twice = ways.carry(run, "image", inputs, lengths, every * 2, 0.0)
        assert len(runs) == times
        assert all(torch.equal(two, one * 2) for one, two in zip(once, twice, strict=True))


@pytest.mark.parametrize("family", ["blip_2", "idefics2", "aria", "got_ocr2"])
def test_tokens_that_look_at_all_patches_or_overlap_are_refused(family: str) -> None:
    parts, inputs, lengths, _, _, every, again = encoded(family, "image")
    with pytest.raises(UnsupportedModelError, match="goes into several tokens") as caught:
        SeenWays(parts).carry(again, "image", inputs, lengths, every, 0.0)
    assert parts.row.model_type in str(caught.value)
