"""Turns a finished session into the plain record that the report is made of."""

from __future__ import annotations

from dataclasses import asdict

from mllm_squeeze.config import Recipe
from mllm_squeeze.dims import ModelDims
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.trace import Attended
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.report import KeyRecord, PrefillRecord, SpanRecord, StageRecord
from mllm_squeeze.upstream.configs import text_sizes


def record(recipe: Recipe, session: Session) -> PrefillRecord:
    """Return what a prefill did, in plain numbers."""
    layout, parts = session.layout, session.parts
    assert layout is not None
    if session.attended is not None:
        return _of_keys(recipe, session, session.attended)
    lengths = tuple(session.lengths.get(n, layout.length) for n in range(len(parts.layers)))
    return PrefillRecord(
        method=recipe.method,
        layout_length=layout.length,
        batch=layout.batch,
        spans=_spans(layout),
        stages=_stages(recipe, session),
        layer_lengths=lengths,
        dims=model_dims(parts),
        element_bytes=next(parts.decoder.parameters()).element_size(),
        past=session.past,
        cache_lengths=tuple(n + session.held.get(layer, session.past) for layer, n in enumerate(lengths)),
    )


def _of_keys(recipe: Recipe, session: Session, attended: Attended) -> PrefillRecord:
    """Return what a prefill did whose pictures are keys: no layer of the LLM runs on fewer tokens."""
    layout, parts = session.layout, session.parts
    assert layout is not None
    layers = len(parts.layers) if attended.layers else 0
    return PrefillRecord(
        method=recipe.method,
        layout_length=attended.tokens,
        batch=layout.batch,
        spans=_spans(layout),
        stages=_stages(recipe, session),
        layer_lengths=(attended.tokens,) * layers,
        dims=model_dims(parts) if attended.layers else None,
        element_bytes=next(parts.decoder.parameters()).element_size(),
        past=session.past,
        keys=KeyRecord(attended.layers, attended.before, attended.after, attended.held_before, attended.held_after),
    )


def _spans(layout: TokenLayout) -> tuple[SpanRecord, ...]:
    return tuple(SpanRecord(span.sample, span.modality, span.length) for span in layout.spans)


def _stages(recipe: Recipe, session: Session) -> tuple[StageRecord, ...]:
    place = "layer" if session.attended is None else "keys"
    return tuple(
        StageRecord(
            layer=trace.layer,
            place="encoder" if trace.cut is session.plan.encoder else place,
            reducer=recipe.steps[trace.cut.step].reducer,
            before=trace.before,
            after=trace.after,
            sequence_before=trace.sequence_before,
            sequence_after=trace.sequence_after,
            seconds=trace.seconds,
        )
        for trace in session.traces
    )


def model_dims(parts: ModelParts) -> ModelDims | None:
    """Return the sizes of the language model, None where its config does not name them."""
    sizes = text_sizes(parts.text_config)
    return None if sizes is None else ModelDims(layers=len(parts.layers), **asdict(sizes))
