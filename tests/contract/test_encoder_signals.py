"""A score of the encoder belongs to the LLM tokens that its patches become: windows, merges, tiles, shuffles, newlines.

Which patches make an LLM token is found by gradients through the projector, so nothing here knows how a family packs.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import matrix
import oracle
import tiny

# Path of the encoder's blocks, the block whose attention is read, the last block before the projector, CLS in front.
# A family that joins adds its row.
ENCODERS = {
    "llava": ("encoder.layers", 1, 1, True),
    "llava_next": ("encoder.layers", 1, 1, True),
    "llava_next_video": ("encoder.layers", 1, 1, True),
    "llava_onevision": ("encoder.layers", 1, 2, False),
    "internvl": ("encoder.layer", 1, 1, True),
    "qwen2_vl": ("blocks", 0, 1, False),
    "qwen2_5_vl": ("blocks", 1, 2, False),
    "qwen3_vl": ("blocks", 1, 2, False),
    "pixtral": ("transformer.layers", 0, 1, False),
    "mistral3": ("transformer.layers", 0, 1, False),
}
CELLS = [(f, k) for f in ENCODERS for k in ("image", "two_images")]
CELLS += [(f, "video") for f in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]


def blocks_of(t: tiny.TinyModel) -> Any:
    """Return the list of the encoder's blocks."""
    return t.model.get_submodule(f"{t.family.tower}.{ENCODERS[t.name][0]}")


def features_of(t: tiny.TinyModel, inputs: tiny.Inputs) -> list[Tensor]:
    """Return the features (L, D) of each picture as the LLM gets them."""
    names: tuple[str, ...] = ("pixel_values", "image_sizes", "image_grid_thw")
    method = t.model.model.get_image_features
    if "pixel_values_videos" in inputs:
        names, method = ("pixel_values_videos", "video_grid_thw"), t.model.model.get_video_features
    items = method(**{k: inputs[k] for k in names if k in inputs}).pooler_output
    # InternVL gives one item per tile; what stands side by side in the prompt is one picture.
    return list(items)


def saliency(t: tiny.TinyModel, inputs: tiny.Inputs, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the attention per patch, in the order of the tower: of the CLS token, or received from all tokens."""
    _, number, _, lead = ENCODERS[t.name]
    block = blocks_of(t)[number]
    modules = set(block.modules())
    home = sys.modules[type(block).__module__]
    seen: list[Tensor] = []
    original = home.eager_attention_forward

    def record(module: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(module, *args, **kwargs)
        if module in modules:
            maps = out[1].float().sum(1)
            seen.append((maps[:, 0, 1:] if lead else maps.sum(1)).flatten())
        return out

    with monkeypatch.context() as patch, matrix.attention(t.model, "eager"), torch.no_grad():
        patch.setattr(home, "eager_attention_forward", record)
        features_of(t, inputs)
    return torch.cat(seen)


def influence(t: tiny.TinyModel, inputs: tiny.Inputs) -> list[Tensor]:
    """Return bool (L, patches) for each picture: which patches behind the last block make each LLM token."""
    _, _, last, lead = ENCODERS[t.name]
    leaves: list[Tensor] = []

    def replace(_: Any, __: Any, output: Any) -> Tensor:
        leaf = output.detach().clone().requires_grad_()
        leaves.append(leaf)
        return leaf

    hook = blocks_of(t)[last].register_forward_hook(replace, prepend=True)
    try:
        items = features_of(t, inputs)
    finally:
        hook.remove()
    (leaf,) = leaves
    out = []
    for item in items:
        rows = []
        for token in item.reshape(-1, item.shape[-1]):
            if not token.requires_grad:
                rows.append(torch.zeros(leaf.numel() // leaf.shape[-1], dtype=torch.bool))
                continue
            (gradient,) = torch.autograd.grad(token.sum(), leaf, retain_graph=True)
            rows.append((gradient[:, 1:] if lead else gradient).abs().sum(-1).flatten() > 0)
        width = max(len(r) for r in rows)
        out.append(torch.stack([r if len(r) == width else r.new_zeros(width) for r in rows]))
    return out


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_visionzip_keeps_what_the_encoder_attends_to(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tiny.load(family)
    inputs = t.inputs[kind]
    patches = saliency(t, inputs, monkeypatch)
    makers = torch.cat(influence(t, inputs)).float()
    assert makers.shape[1] == len(patches)
    scores = torch.where(makers.sum(1) > 0, (makers @ patches) / makers.sum(1).clamp(min=1), -torch.inf)
    with matrix.applied(t.model, "visionzip", keep=12) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
        kept, spans = set(handle.cuts[0].kept[0].tolist()), handle.layout.spans
    start = 0
    for span in spans:
        columns, mine = torch.tensor(span.columns), scores[start : start + span.length]
        start += span.length
        # Of 12 tokens, 12 / 6.4 rounded = 2 are targets of merging, 10 are those with the largest scores.
        dominant = set(columns[mine.argsort(descending=True, stable=True)[:10]].tolist())
        assert len(kept & set(span.columns)) == 12
        assert dominant <= kept
        # A score taken in another order would choose others.
        assert dominant != set(columns[mine.flip(0).argsort(descending=True, stable=True)[:10]].tolist())
    assert start == len(scores)


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_dart_keeps_the_tokens_with_the_largest_keys(family: str) -> None:
    """The four visual tokens with the largest keys of the layer before, behind the rotary embedding, are its pivots."""
    t = tiny.load(family)
    for kind in ("image", "two_images"):
        inputs = t.inputs[kind]
        keys = oracle.run(t.model, inputs, oracle.forced_tokens(1, 0)).cache.layers[1].keys
        norms = keys[0].abs().sum((0, 2))
        with matrix.applied(t.model, "dart") as handle:
            oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
            kept, spans = set(handle.cuts[0].kept[0].tolist()), handle.layout.spans
        for span in spans:
            columns = torch.tensor(span.columns)
            assert set(columns[norms[columns].argsort(descending=True)[:4]].tolist()) <= kept
