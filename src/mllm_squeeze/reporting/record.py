"""Keeps what a prefill did once it ended, and turns it into the plain record that the report is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.trace import Attended, Cut, StageTrace
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.recipe.recipe import Recipe
from mllm_squeeze.reducers.base import MODALITIES
from mllm_squeeze.reporting.report import KeyRecord, PrefillRecord, SpanRecord, StageRecord
from mllm_squeeze.upstream.configs import TextSizes, text_sizes

FELL_BACK = "words and pictures compared in the language model's own space: no text_encoder was given"


@dataclass(frozen=True)
class FinishedPrefill:
    """What is left of a prefill once it ended: no part of the model, no activations.

    layers: decoder layers of the model. lengths, held: columns and earlier cache entries of each layer that was hooked.
    takes: modalities of the model.
    """

    layout: TokenLayout
    cuts: tuple[Cut, ...]
    traces: tuple[StageTrace, ...]
    encoder: PlannedCut | None
    attended: Attended | None
    lengths: Mapping[int, int]
    held: Mapping[int, int]
    past: int
    layers: int
    dims: TextSizes | None
    element_bytes: int
    falls_back: bool = False
    takes: tuple[str, ...] = ()


def finished(prefill: Prefill) -> FinishedPrefill:
    """Return what a prefill did; times are read from the device only when a record is made of it."""
    parts = prefill.parts
    return FinishedPrefill(
        layout=prefill.layout,
        cuts=tuple(prefill.cuts),
        traces=tuple(prefill.traces),
        encoder=prefill.plan.encoder,
        attended=prefill.attended,
        lengths=dict(prefill.lengths),
        held=dict(prefill.held),
        past=prefill.past,
        layers=len(parts.layers),
        dims=text_sizes(parts.text_config, len(parts.layers)),
        element_bytes=next(parts.decoder.parameters()).element_size(),
        falls_back=prefill.plan.falls_back,
        takes=tuple(parts.row.modalities),
    )


def record(recipe: Recipe, prefill: FinishedPrefill) -> PrefillRecord:
    """Return what a prefill did, in plain numbers."""
    if prefill.attended is not None:
        return _of_keys(recipe, prefill, prefill.attended)
    layout = prefill.layout
    lengths = tuple(prefill.lengths.get(n, layout.length) for n in range(prefill.layers))
    return PrefillRecord(
        method=recipe.method,
        layout_length=layout.length,
        batch=layout.batch,
        spans=_spans(layout),
        stages=_stages(recipe, prefill),
        layer_lengths=lengths,
        dims=prefill.dims,
        element_bytes=prefill.element_bytes,
        past=prefill.past,
        cache_lengths=tuple(n + prefill.held.get(layer, prefill.past) for layer, n in enumerate(lengths)),
        signals=(FELL_BACK,) if prefill.falls_back else (),
        idle=_idle(recipe, prefill),
    )


def _of_keys(recipe: Recipe, prefill: FinishedPrefill, attended: Attended) -> PrefillRecord:
    """Return what a prefill did whose pictures are keys: no layer of the LLM runs on fewer tokens."""
    layout = prefill.layout
    layers = prefill.layers if attended.layers else 0
    return PrefillRecord(
        method=recipe.method,
        layout_length=attended.tokens,
        batch=layout.batch,
        spans=_spans(layout),
        stages=_stages(recipe, prefill),
        layer_lengths=(attended.tokens,) * layers,
        dims=prefill.dims if attended.layers else None,
        element_bytes=prefill.element_bytes,
        past=prefill.past,
        keys=KeyRecord(attended.layers, attended.before, attended.after, attended.held_before, attended.held_after),
        idle=_idle(recipe, prefill),
    )


def _idle(recipe: Recipe, prefill: FinishedPrefill) -> tuple[str, ...]:
    """Return a sentence for each step of which the prompt holds nothing, and whether the model could take it at all."""
    held = {span.modality for span in prefill.layout.spans}
    out = []
    for number, step in enumerate(recipe.steps, 1):
        reduces = step.built.facts.modalities
        if not reduces & held:
            why = "the prompt holds none" if reduces & set(prefill.takes) else "this model takes none"
            named = " or ".join(name for name in MODALITIES if name in reduces)
            out.append(f"recipe step {number} ({step.rule}) had nothing to do: it reduces {named} tokens, and {why}")
    return tuple(out)


def _spans(layout: TokenLayout) -> tuple[SpanRecord, ...]:
    return tuple(SpanRecord(span.sample, span.modality, span.length) for span in layout.spans)


def _stages(recipe: Recipe, prefill: FinishedPrefill) -> tuple[StageRecord, ...]:
    place = "layer" if prefill.attended is None else "keys"
    return tuple(
        StageRecord(
            layer=trace.layer,
            place="encoder" if trace.cut is prefill.encoder else place,
            reducer=recipe.steps[trace.cut.step].rule,
            before=trace.before,
            after=trace.after,
            sequence_before=trace.sequence_before,
            sequence_after=trace.sequence_after,
            seconds=trace.seconds,
            asked=trace.asked,
        )
        for trace in prefill.traces
    )
