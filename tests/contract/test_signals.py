"""What methods read is what the dense model computes: attention of the last row, of the next layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import matrix
import oracle
import tiny


@torch.no_grad()
def attention_of(t: tiny.TinyModel, inputs: tiny.Inputs, layer: int) -> Tensor:
    """Return the dense attention (B, T, T) of a decoder layer, mean over heads, from eager attention maps."""
    with matrix.attention(t.model, "eager"):
        width = inputs["input_ids"].shape[1]
        where = oracle.positions(t.model, inputs, 0)[..., :width]
        out = t.model(**inputs, position_ids=where, output_attentions=True)
    return out.attentions[layer].float().mean(1)


def best(scores: Tensor, columns: Tensor, count: int) -> set[int]:
    """Return the columns with the highest scores."""
    order = scores[columns].argsort(descending=True, stable=True)[:count]
    return set(columns[order].tolist())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_fastv_keeps_what_the_last_token_attends_to(family: str, layer: int, implementation: str) -> None:
    t = tiny.load(family)
    for kind in ("image", "two_images"):
        inputs = t.inputs[kind]
        scores = attention_of(t, inputs, layer - 1)[0, -1]
        with matrix.attention(t.model, implementation), matrix.applied(t.model, "fastv", layer=layer) as handle:
            oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
            kept, spans = set(handle.cuts[0].kept[0].tolist()), handle.layout.spans
        for span in spans:
            columns = torch.tensor(span.columns)
            assert kept & set(span.columns) == best(scores, columns, (span.length + 1) // 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_fastv_in_a_padded_batch(family: str, side: str) -> None:
    t = tiny.load(family)
    batch = t.batch(("image", "two_images"), side)
    attention = attention_of(t, batch.inputs, 1)
    with matrix.applied(t.model, "fastv") as handle:
        oracle.run(t.model, batch.inputs, oracle.forced_tokens(2, 0))
        cut, layout = handle.cuts[0], handle.layout
    for span in layout.spans:
        real = batch.inputs["attention_mask"][span.sample].nonzero().flatten()
        scores = attention[span.sample, int(real[-1])]
        kept = set(cut.kept[span.sample].tolist()) & set(span.columns)
        assert kept == best(scores, torch.tensor(span.columns), (span.length + 1) // 2)


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_two_steps_at_one_layer_read_the_same_attention(family: str) -> None:
    """The second chooses among what the first left, by its own rows, where these tokens stand now."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    steps = [
        {"score": {"attention": "last"}, "at": {"layer": 2}, "ratio": 0.25},
        {"score": {"attention": "text"}, "at": {"layer": 2}, "ratio": 0.75},
    ]
    attention = attention_of(t, inputs, 1)[0]
    with matrix.squeeze.applied(t.model, {"method": "twice", "steps": steps}) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
        first, second = (set(cut.kept[0].tolist()) for cut in handle.cuts)
        (span,) = handle.layout.spans
    columns = torch.tensor(span.columns)
    left = best(attention[-1], columns, round(0.75 * span.length))
    assert first & set(span.columns) == left
    behind = attention[int(columns[-1]) + 1 :].mean(0)
    wanted = best(behind, torch.tensor(sorted(left)), round(0.25 * span.length))
    assert second & set(span.columns) == wanted
    assert wanted != best(attention[-1], torch.tensor(sorted(left)), len(wanted))


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_the_preview_is_the_attention_of_the_next_layer(family: str) -> None:
    """The first cut of PyramidDrop previews a layer that still sees everything, so the dense map tells its choice."""
    t = tiny.load(family)
    for kind in ("image", "two_images"):
        inputs = t.inputs[kind]
        scores = attention_of(t, inputs, 1)[0, -1]
        with matrix.applied(t.model, "pyramiddrop", layers=[1], ratio=0.5) as handle:
            oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
            kept, spans = set(handle.cuts[0].kept[0].tolist()), handle.layout.spans
        for span in spans:
            columns = torch.tensor(span.columns)
            assert kept & set(span.columns) == best(scores, columns, (span.length + 1) // 2)


@pytest.mark.quick
def test_features_from_a_cache_bring_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other code encodes a picture once for many prompts, each prompt is cut as if it were encoded for it."""
    t = tiny.fresh("llava")
    inner, inputs, forced = type(t.model.model), t.inputs["image"], oracle.forced_tokens(1, 2)
    encode, seen = inner.get_image_features, []

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(encode(self, *args, **kwargs))
        return seen[0]

    monkeypatch.setattr(inner, "get_image_features", cached)
    with matrix.applied(t.model, "visionzip") as handle:
        first = oracle.run(t.model, inputs, forced)
        monkeypatch.setattr(t.model.model.vision_tower, "forward", None)
        again = oracle.run(t.model, inputs, forced)
        assert len(handle.cuts[0].kept[0]) < inputs["input_ids"].shape[1]
    oracle.assert_close(again.prefill, first.prefill, "prefill")
    oracle.assert_close(again.decode, first.decode, "decode")
