"""Every family: nothing changes at ratio 0, and a cut equals masking, in prefill and in each step of generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from families import proof

METHODS = tuple(proof.PLACES)
PIECES = {"image": "image", "two_images": "image", "video": "video", "two_videos": "video", "audio": "audio"}


def cells() -> list[Any]:
    """Return (family, kind) of everything that a family can be shown."""
    out = []
    for family in proof.SERVED:
        for kind in proof.shown(family):
            out.append(pytest.param(family, kind, id=f"{family}-{kind}", marks=proof.marks(family)))
    return out


@pytest.mark.parametrize(("family", "method"), proof.pairs(METHODS))
def test_ratio_zero_is_bit_equal(family: str, method: str) -> None:
    t = tiny.load(family)
    inputs, forced = t.inputs[proof.first_kind(family, method)], oracle.forced_tokens(1, 2)
    dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    with squeeze.applied(t.model, method, **proof.params(family, method, **matrix.method(method).nothing)):
        assert torch.equal(proof.forward(t, inputs), dense)
        assert torch.equal(proof.generate(t, inputs, forced), steps)


@pytest.mark.parametrize(("family", "kind"), cells())
def test_all_kinds_of_prompts_before_the_llm(family: str, kind: str, covers: Any) -> None:
    """One or several images, videos of different lengths, sounds, and mixtures of them."""
    covers(family, "projector", PIECES.get(kind))
    t = tiny.load(family)
    handle = proof.squeeze_and_prove(t, kind, "divprune")
    proof.check_cuts(t, t.inputs[kind], handle)
    for span in handle.layout.spans:
        kept = set(handle.cuts[-1].kept[0].tolist()) & set(span.columns)
        assert 0 < len(kept) < span.length, f"{span.modality} {span.item} was not cut"


@pytest.mark.parametrize(("family", "method"), proof.pairs(METHODS))
def test_each_place(family: str, method: str, covers: Any) -> None:
    t = tiny.load(family)
    kind = proof.first_kind(family, method)
    if proof.frames_unknown(t, kind, method):
        with pytest.raises(squeeze.SqueezeError, match="grid of the video is not known"):
            proof.squeeze_and_prove(t, kind, method)
        covers(family, "frames", refused=f"{method} does not know the grid of its frames; use vidcom2.")
        return
    covers(family, proof.PLACES[method])
    handle = proof.squeeze_and_prove(t, kind, method)
    proof.check_cuts(t, t.inputs[kind], handle)


@pytest.mark.parametrize(("family", "method"), proof.in_turn(proof.families()))
def test_with_eager_masks(family: str, method: str) -> None:
    t = tiny.load(family)
    with proof.eager(t.model):
        proof.squeeze_and_prove(t, proof.first_kind(family, method), method)


@pytest.mark.parametrize("family", proof.families(("ernie4_5_vl_moe",)))
def test_scores_of_videos_whose_frames_are_merged(family: str) -> None:
    """Two frames become one, so the scores of both go to each of its tokens."""
    handle = proof.squeeze_and_prove(tiny.load(family), "two_videos", "visionzip")
    assert [span.tiles[0].frames for span in handle.layout.spans] == [1, 2]
