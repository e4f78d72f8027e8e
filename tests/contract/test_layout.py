"""Where the engine sees the pictures of a prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import matrix
import tiny
from mllm_squeeze.family.table import TABLE

SPANS = {"image": 1, "video": 1, "two_images": 2, "image_video": 2}
CELLS = [(f, k) for f in matrix.FAMILIES for k in SPANS if matrix.has(f, k)]


def expected_spans(family: str, kind: str) -> int:
    """Return the number of pictures; a family without videos shows the three frames of one as images of their own."""
    return SPANS[kind] + (2 if "video" in kind and "video" not in matrix.modalities(family, kind) else 0)


def visual_columns(t: tiny.TinyModel, inputs: tiny.Inputs, sample: int) -> Tensor:
    """Return the columns of a sample's visual tokens."""
    return t.visual(inputs)[sample].nonzero().flatten()


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_spans_of_one_prompt(family: str, kind: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, "random") as handle, torch.no_grad():
        t.model(**t.inputs[kind])
        layout = handle.layout
    assert len(layout.spans) == expected_spans(family, kind)
    assert [c for span in layout.spans for c in span.columns] == visual_columns(t, t.inputs[kind], 0).tolist()
    for span in layout.spans:
        assert span.tiles, "the grid of this family is known"
        assert sum(tile.length for tile in span.tiles) == span.length
    videos = [span for span in layout.spans if span.modality == "video"]
    assert len(videos) == (1 if "video" in matrix.modalities(family, kind) else 0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_spans_of_a_padded_batch(family: str, side: str) -> None:
    t = tiny.load(family)
    batch = t.batch(("two_images", "text", "image"), side)
    with matrix.applied(t.model, "random") as handle, torch.no_grad():
        t.model(**batch.inputs)
        layout = handle.layout
    assert [span.sample for span in layout.spans] == [0, 0, 2]
    for sample in range(3):
        found = [c for span in layout.spans if span.sample == sample for c in span.columns]
        assert found == visual_columns(t, batch.inputs, sample).tolist()
    assert torch.equal(layout.real, batch.inputs["attention_mask"].bool())


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_each_picture_has_its_own_budget(family: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, "fastv", ratio=0.5) as handle, torch.no_grad():
        t.model(**t.inputs["two_images"])
        kept = set(handle.cuts[-1].kept[0].tolist())
        for span in handle.layout.spans:
            assert len(kept & set(span.columns)) == (span.length + 1) // 2


# Worked out by hand, for towers that cut pictures into tiles; other grids follow from the inputs.
TILED = {
    "llava_next": [[(1, 4, 4), (1, 8, 4)], [(1, 4, 4), (1, 8, 8)]],
    "llava_next_video": [[(1, 4, 4), (1, 8, 4)], [(1, 4, 4), (1, 8, 8)]],
    "llava_onevision": [[(1, 4, 4), (1, 8, 4)], [(1, 4, 4), (1, 8, 8)]],
    "internvl": [[(1, 4, 4)] * 2, [(1, 4, 4)] * 3],
}
POOLED_VIDEO = (8, 2, 2)


def grids(t: tiny.TinyModel, kind: str) -> list[list[tuple[int, int, int]]]:
    """Return (frames, height, width) of each tile of each picture, from the inputs or the size of the tower."""
    if t.name in TILED and kind == "two_images":
        return TILED[t.name]
    if TABLE[t.name].grid == "anyres":
        return [[POOLED_VIDEO]]
    vision = t.model.config.vision_config
    found = t.inputs[kind].get("video_grid_thw" if kind == "video" else "image_grid_thw")
    if found is not None:
        merge = vision.spatial_merge_size
        return [[(frames, height // merge, width // merge)] for frames, height, width in found.tolist()]
    side = vision.image_size // vision.patch_size
    return [[(1, side, side)]] * SPANS[kind]


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_grids(family: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, "random") as handle, torch.no_grad():
        for kind in ("two_images", "video"):
            # A video that is shown as images is as many pictures.
            if not matrix.has(family, kind) or matrix.modalities(family, kind) != {kind.replace("two_images", "image")}:
                continue
            t.model(**t.inputs[kind])
            found = [[(i.frames, i.height, i.width) for i in span.tiles] for span in handle.layout.spans]
            assert found == grids(t, kind)
