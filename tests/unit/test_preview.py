"""The preview of the next layer projects one row only; what it reads is what the whole layer would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
import tiny
from mllm_squeeze.engine.hooks import preview
from mllm_squeeze.engine.signals import attention as signals


def previews(family: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the scores of every preview that PyramidDrop asks for."""
    seen: list[torch.Tensor] = []
    score = signals.score_joined

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(score(*args, **kwargs))
        return seen[-1]

    t = tiny.load(family)
    monkeypatch.setattr(signals, "score_joined", recorded)
    with squeeze.applied(t.model, "pyramiddrop", ratio=0.75), torch.no_grad():
        t.model(**t.batch().inputs)
    monkeypatch.setattr(signals, "score_joined", score)
    return seen


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_one_row_is_enough(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = previews(family, monkeypatch)
    monkeypatch.setattr(preview, "rowwise_projections", lambda attention: ())
    whole = previews(family, monkeypatch)
    assert len(narrow) == len(whole) == 3
    for one, other in zip(narrow, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_it_stops_before_the_output_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    t = tiny.load("llava")
    rows: list[int] = []
    layer = t.model.model.language_model.layers[1].self_attn
    hook = layer.q_proj.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    calls: list[int] = []
    after = layer.o_proj.register_forward_hook(lambda module, args, out: calls.append(1))
    try:
        with squeeze.applied(t.model, "pyramiddrop", ratio=0.75), torch.no_grad():
            t.model(**t.inputs["image"])
    finally:
        hook.remove()
        after.remove()
    assert rows[0] == 1
    assert len(rows) == 2
    assert len(calls) == 1
