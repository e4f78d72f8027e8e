"""Leaving visual entries of the cache out of attention while decoding, chosen anew step by step."""

from __future__ import annotations

from typing import Any

import torch

from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.signals.rows import AttentionCall, score_rows
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.reducers.base import DecodeReducer


def listen(running: Pass, attention: Any, reducer: DecodeReducer, cache: Any) -> None:
    """Make the tap of the layer before choose which visual entries the later layers see in this step.

    The choice and the row it was made from live with the cache, so that steps, beams and copies of a cache stay apart.
    """
    holder = _holder(running, reducer.layer)
    entries = kv.kept_entries(cache, holder)
    if entries is None or entries.visual is None:
        return
    before = kv.kept_entries(cache, running.parts.kv_sources.get(reducer.layer - 1, reducer.layer - 1))
    if before is None or before.columns.shape != entries.columns.shape:
        raise ConfigError(
            f"To choose entries of the cache from layer {reducer.layer} on while decoding, layer {reducer.layer - 1} "
            "must hold the same entries; put the layer at least one behind the last cut."
        )
    visual = entries.visual

    def read(call: AttentionCall) -> bool:
        layer: Any = kv.layer_at(cache, holder)
        batch, _, queries, _ = call.query.shape
        rows = call.query.new_full((batch, 1), queries - 1, dtype=torch.long)
        scores = score_rows(call, rows, torch.ones_like(rows, dtype=torch.float32))
        row = scores[:, : visual.shape[1]]
        notes = layer.notes or {}
        kept, stored = reducer.refresh(row, notes.get("row"), notes.get("kept"), visual.to(row.device))
        layer.notes = {"row": stored, "kept": kept}
        running.arguments.close(visual.to(row.device) & ~kept)
        return False

    running.signals.listeners[attention] = read


def _holder(running: Pass, layer: int) -> int:
    """Return the layer that holds the entries which the first attention layer from `layer` on reads."""
    parts = running.parts
    first = next((n for n in range(layer, len(parts.layers)) if parts.has_entries(n)), None)
    if first is None:
        raise ConfigError(
            f"Entries of the cache are chosen from layer {layer} on while decoding, and no layer from there on has "
            "attention; choose a lower layer."
        )
    return parts.kv_sources.get(first, first)
