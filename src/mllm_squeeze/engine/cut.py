"""One cut: what the reducer gets to see, what it answers, and the sequence that is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.engine import limits
from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals import gather as signals
from mllm_squeeze.engine.signals.source import Found
from mllm_squeeze.engine.timing import marked, now
from mllm_squeeze.engine.tokens.features import PRUNED, SEPARATOR
from mllm_squeeze.engine.tokens.table import SpanTable
from mllm_squeeze.engine.trace import StageTrace
from mllm_squeeze.layout import Span
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Size
from mllm_squeeze.upstream.calls import LayerCall


@dataclass(frozen=True)
class _Candidates:
    """The tokens a reducer may choose from: some spans (rows of the table), without separators where it asks so.

    rows: spans it reduces. table: those rows. order: int64 (S', N'), slots of the table in which candidates stand.
    mask: bool (S', N'). current, budget: per row, on the host.
    """

    rows: list[int]
    table: SpanTable
    order: Tensor
    mask: Tensor
    current: tuple[int, ...]
    budget: tuple[int, ...]

    @property
    def place(self) -> Tensor:
        return self.table.place.gather(1, self.order)

    @property
    def size(self) -> Tensor:
        """Tokens that each candidate stands for, float32 (S', N')."""
        size = self.table.size
        return torch.ones_like(self.order, dtype=torch.float32) if size is None else size.gather(1, self.order)


def run_cut(session: Prefill, planned: PlannedCut, hidden: Tensor, call: LayerCall | None = None) -> Tensor:
    """Run one cut at the input of a layer; returns the hidden states (B, M', D) of what is left.

    call: of the layer, for signals that preview it. Warns where there was nothing to cut.
    """
    found = _candidates(session, planned)
    if found is None:
        return hidden
    start = now(hidden.device)
    tokens = _tokens(session, planned, found, hidden, call, planned.reducer.needs())
    reduction = _reduce(planned, tokens)
    hidden = session.merge(hidden, reduction, found.table, found.place, found.mask)
    if reduction.merges and Size() in session.plan.needs:
        _add_sizes(session, found, reduction)
    chosen = _chosen(session, planned, found, reduction.keep)
    counts = _counts(session, planned, found, chosen)
    limits.warn_left(session, planned, found.rows, found.current, found.budget, counts)
    return _finish(session, planned, planned.layer, hidden, chosen, counts, _asked(session, planned, found), start)


@marked("select")
def _reduce(planned: PlannedCut, tokens: VisualTokens) -> Reduction:
    return planned.reducer.reduce(tokens)


def cut_survivors(session: Prefill, planned: PlannedCut, hidden: Tensor) -> Tensor:
    """Cut what a reduction inside the encoder pruned, and the duplicates it left behind; at the input of layer 0."""
    groups = {m: f.groups for m, f in session.features.items() if f.groups is not None}
    if not groups:
        return hidden
    start = now(hidden.device)
    table = session.table
    chosen, size = torch.ones_like(table.mask), torch.ones_like(table.mask, dtype=torch.float32)
    counts = list(table.current)
    for row, span in enumerate(session.layout.spans):
        items = groups.get(span.modality)
        if items is not None:
            every = torch.cat([items[span.item + n] for n in range(span.items)]).to(chosen.device)
            kept, stands_for = _first_of_groups(every[table.origin[row, : span.length]])
            chosen[row, : span.length], size[row, : span.length] = kept, stands_for
            counts[row] = int(kept.sum())
    session.table = replace(table, size=size)
    reduced = [row for row, span in enumerate(session.layout.spans) if span.modality in groups]
    asked = limits.asked_in_encoder(session, planned, reduced)
    return _finish(session, planned, 0, hidden, chosen, tuple(counts), asked, start)


def _first_of_groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return bool (N,), the first token of each group and all separators, and float32 (N,), the tokens of its group."""
    _, number = group.unique(return_inverse=True)
    count = number.bincount()
    place = torch.arange(len(group), device=group.device)
    first = torch.full_like(count, len(group)).scatter_reduce(0, number, place, "amin")
    kept = ((first[number] == place) & (group != PRUNED)) | (group == SEPARATOR)
    return kept, count[number].masked_fill(group == SEPARATOR, 1).float()


@marked("signal")
def choose_rows(session: Prefill, planned: PlannedCut, hidden: Tensor) -> None:
    """Ask a reducer which text rows it wants to read; at the input of layer 0."""
    found = _candidates(session, planned)
    if found is None:
        return
    needs = planned.reducer.row_needs()
    picked = planned.reducer.choose_rows(_tokens(session, planned, found, hidden, None, needs))
    votes = torch.zeros_like(session.text_mask, dtype=torch.float32)
    votes = votes.index_add(0, found.table.sample, picked.float())
    session.signals.row_weights[planned.step] = signals.mean_weights((votes > 0) & session.text_mask)


def _finish(
    session: Prefill,
    planned: PlannedCut,
    layer: int,
    hidden: Tensor,
    chosen: Tensor,
    counts: tuple[int, ...],
    asked: tuple[int, ...] | None,
    start: Any,
) -> Tensor:
    before, length = session.table.current, hidden.shape[1]
    if counts != before:
        hidden = session.advance(layer, hidden, chosen, counts)
    trace = StageTrace(planned, layer, before, counts, asked, length, hidden.shape[1], (start, now(hidden.device)))
    session.traces.append(trace)
    return hidden


@marked("select")
def _candidates(session: Prefill, planned: PlannedCut) -> _Candidates | None:
    """Return what may be chosen from, None where the budget asks for all that is there, or nothing is."""
    layout = session.layout
    reducer, table = planned.reducer, session.table
    rows = [n for n, span in enumerate(layout.spans) if span.modality in planned.facts.modalities]
    if not rows:
        _warn_idle(session, planned.name)
        return None
    asked = limits.asked_of(session, planned, rows)
    if asked is None:
        return None
    current = {n: limits.current_of(session, reducer.separators, n) for n in rows}
    # A rule that decides its own count may have left nothing of a span.
    rows = [n for n in rows if current[n]]
    if not rows:
        return None
    picked = table if len(rows) == len(layout.spans) else table.rows(rows)
    may = picked.mask if reducer.separators == "compete" else picked.mask & _is_cell(session, picked, rows)
    there = tuple(current[n] for n in rows)
    order = picked.order(may, max(there))
    budget = tuple(min(asked[n], current[n]) for n in rows)
    limits.require_reachable(session, planned, rows, there, budget)
    return _Candidates(rows, picked, order, may.gather(1, order), there, budget)


def _warn_idle(session: Prefill, name: str) -> None:
    """Warn where no step of the method reduces anything of the prompt; where one does, the report names the others."""
    given = {span.modality for span in session.layout.spans}
    if not session.plan.modalities & given:
        limits.warn(
            f"'{name}' reduces {', '.join(sorted(session.plan.modalities))} tokens, the prompt holds only "
            f"{', '.join(sorted(given))}; nothing was cut."
        )


def _is_cell(session: Prefill, table: SpanTable, rows: list[int]) -> Tensor:
    unknown = ops.on_device([int(not session.layout.spans[n].tiles) for n in rows], table.mask) > 0
    return (table.grid[..., 0] >= 0) | unknown[:, None]


@marked("signal")
def _tokens(
    session: Prefill,
    planned: PlannedCut,
    found: _Candidates,
    hidden: Tensor,
    call: LayerCall | None,
    needs: tuple[Need, ...],
) -> VisualTokens:
    spans = [session.layout.spans[n] for n in found.rows]
    origin = found.table.origin.gather(1, found.order)
    wanted = Found(found.table, found.place, origin, found.size, found.mask, found.rows)
    gathered, words = signals.gather(session, planned, needs, hidden, call, wanted)
    grid = found.table.grid.gather(1, found.order[..., None].expand(-1, -1, 4))
    return VisualTokens(
        mask=found.mask,
        budget=ops.on_device(found.budget, hidden),
        counts=found.budget,
        grid=torch.where(found.mask[..., None], grid, -1),
        origin=origin,
        lengths=tuple(span.length for span in spans),
        current=found.current,
        tiles=tuple(span.tiles for span in spans),
        sample=tuple(span.sample for span in spans),
        modality=tuple(span.modality for span in spans),
        links=_links(spans),
        signals=gathered,
        text_mask=words,
        among=signals.among(session, planned, needs, wanted),
        asked=not planned.decides,
        history=tuple(_history(session, planned, row) for row in found.rows),
        depth=len(session.parts.layers),
    )


def _history(session: Prefill, planned: PlannedCut, row: int) -> tuple[int, ...]:
    """Return the tokens of a span before the first cut by this rule, and behind each by now; () before the first."""
    traces = [trace for trace in session.traces if type(trace.cut.reducer) is type(planned.reducer)]
    return (traces[0].before[row], *(trace.after[row] for trace in traces)) if traces else ()


def _links(spans: Sequence[Span]) -> tuple[tuple[int, ...], ...]:
    """Return for each span the numbers of the others of its sample."""
    return tuple(
        tuple(n for n, other in enumerate(spans) if other.sample == span.sample and other is not span) for span in spans
    )


@marked("select")
def _chosen(session: Prefill, planned: PlannedCut, found: _Candidates, keep: Tensor) -> Tensor:
    """Return bool (S, N) over all spans: what the reducer keeps, and all it was not asked about."""
    inside = torch.zeros_like(found.table.mask).scatter(1, found.order, keep & found.mask)
    asked = torch.zeros_like(found.table.mask).scatter(1, found.order, found.mask)
    if planned.reducer.separators != "drop":
        inside = inside | (found.table.mask & ~asked)
    if len(found.rows) == session.table.mask.shape[0]:
        return inside
    chosen = session.table.mask.clone()
    chosen[ops.on_device(found.rows, chosen)] = inside
    return chosen


@marked("select")
def _counts(session: Prefill, planned: PlannedCut, found: _Candidates, chosen: Tensor) -> tuple[int, ...]:
    """Return the tokens each span keeps; read from the device only where they depend on the content."""
    if planned.decides or not planned.facts.known_count:
        return tuple(int(n) for n in (chosen & session.table.mask).sum(1).tolist())
    counts = list(session.table.current)
    for row, current, budget in zip(found.rows, found.current, found.budget, strict=True):
        others = limits.beside(session, planned, row, current)
        counts[row] = others + planned.reducer.count(current, budget, session.layout.spans[row].tiles)
    return tuple(counts)


def _asked(session: Prefill, planned: PlannedCut, found: _Candidates) -> tuple[int, ...] | None:
    """Return the tokens each span was asked to keep, what stays anyway included; None where the rule decides."""
    if planned.decides:
        return None
    out = list(session.table.current)
    for row, current, budget in zip(found.rows, found.current, found.budget, strict=True):
        out[row] = limits.beside(session, planned, row, current) + budget
    return tuple(out)


@marked("merge")
def _add_sizes(session: Prefill, found: _Candidates, reduction: Reduction) -> None:
    """Count for each survivor what was merged into it."""
    table = session.table
    size = torch.ones_like(table.mask, dtype=torch.float32) if table.size is None else table.size.clone()
    rows = ops.on_device(found.rows, size)[:, None]
    size[rows, found.order] = reduction.sizes(found.size)
    session.table = replace(table, size=size)
