"""One cut: what the reducer gets to see, what it answers, and the sequence that is left."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.session import Session
from mllm_squeeze.engine.signals import gather as signals
from mllm_squeeze.engine.signals.source import Found
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.spans import PRUNED, SEPARATOR, SpanTable
from mllm_squeeze.engine.trace import StageTrace, now
from mllm_squeeze.errors import SqueezeWarning
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


def run_cut(session: Session, planned: PlannedCut, hidden: Tensor, call: LayerCall | None = None) -> Tensor:
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
    if reduction.assign is not None and Size() in session.plan.needs:
        _add_sizes(session, found, reduction.assign)
    chosen = _chosen(session, planned, found, reduction.keep)
    counts = _counts(session, planned, found, chosen)
    _warn_left(session, planned, found, counts)
    return _finish(session, planned, planned.layer, hidden, chosen, counts, start)


@marked("select")
def _reduce(planned: PlannedCut, tokens: VisualTokens) -> Reduction:
    return planned.reducer.reduce(tokens)


def cut_survivors(session: Session, planned: PlannedCut, hidden: Tensor) -> Tensor:
    """Cut what a reduction inside the encoder pruned, and the duplicates it left behind; at the input of layer 0."""
    groups = {m: f.groups for m, f in session.features.items() if f.groups is not None}
    if not groups or session.layout is None:
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
    return _finish(session, planned, 0, hidden, chosen, tuple(counts), start)


def _first_of_groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return bool (N,), the first token of each group and all separators, and float32 (N,), the tokens of its group."""
    _, number = group.unique(return_inverse=True)
    count = number.bincount()
    place = torch.arange(len(group), device=group.device)
    first = torch.full_like(count, len(group)).scatter_reduce(0, number, place, "amin")
    kept = ((first[number] == place) & (group != PRUNED)) | (group == SEPARATOR)
    return kept, count[number].masked_fill(group == SEPARATOR, 1).float()


@marked("signal")
def choose_rows(session: Session, planned: PlannedCut, hidden: Tensor) -> None:
    """Ask a reducer which text rows it wants to read; at the input of layer 0."""
    found = _candidates(session, planned)
    if found is None:
        return
    needs = planned.reducer.row_needs()
    picked = planned.reducer.choose_rows(_tokens(session, planned, found, hidden, None, needs))
    votes = torch.zeros_like(session.text_mask, dtype=torch.float32)
    votes = votes.index_add(0, found.table.sample, picked.float())
    session.row_weights[planned.step] = signals.mean_weights((votes > 0) & session.text_mask)


def _finish(
    session: Session,
    planned: PlannedCut,
    layer: int,
    hidden: Tensor,
    chosen: Tensor,
    counts: tuple[int, ...],
    start: Any,
) -> Tensor:
    before, length = session.table.current, hidden.shape[1]
    if counts != before:
        hidden = session.advance(layer, hidden, chosen, counts)
    trace = StageTrace(planned, layer, before, counts, length, hidden.shape[1], (start, now(hidden.device)))
    session.traces.append(trace)
    return hidden


@marked("select")
def _candidates(session: Session, planned: PlannedCut) -> _Candidates | None:
    """Return what may be chosen from, None where the budget asks for all that is there, or nothing is."""
    layout = session.layout
    assert layout is not None
    reducer, table = planned.reducer, session.table
    rows = [n for n, span in enumerate(layout.spans) if span.modality in reducer.facts.modalities]
    if not rows:
        given = sorted({span.modality for span in layout.spans})
        _warn(
            f"'{planned.name}' reduces {', '.join(sorted(reducer.facts.modalities))} tokens, the prompt holds only "
            f"{', '.join(given)}; nothing was cut."
        )
        return None
    whole = {n: _whole(reducer.separators, layout.spans[n]) for n in rows}
    budget = {n: planned.budget(whole[n]) for n in rows}
    _warn_above(planned, list(whole.values()))
    if budget == whole and not planned.decides:
        return None
    current = {n: _current(session, reducer.separators, n) for n in rows}
    # A rule that decides its own count may have left nothing of a span.
    rows = [n for n in rows if current[n]]
    if not rows:
        return None
    picked = table if len(rows) == len(layout.spans) else table.rows(rows)
    may = picked.mask if reducer.separators == "compete" else picked.mask & _is_cell(session, picked, rows)
    there = tuple(current[n] for n in rows)
    order = picked.order(may, max(there))
    asked = tuple(min(budget[n], current[n]) for n in rows)
    return _Candidates(rows, picked, order, may.gather(1, order), there, asked)


def _whole(separators: str, span: Span) -> int:
    """Return how many of a span's tokens a budget speaks of."""
    return (_cells(span.tiles) or span.length) if separators == "keep" else span.length


def _current(session: Session, separators: str, row: int) -> int:
    """Return how many tokens of a span a reducer may choose from now."""
    assert session.layout is not None
    span, current = session.layout.spans[row], session.table.current[row]
    cells = _cells(span.tiles) or span.length
    if separators != "compete" and session.stage == 0:
        return cells
    return current - (span.length - cells) if separators == "keep" else current


def _cells(tiles: Sequence[Any]) -> int:
    return sum(tile.cells for tile in tiles)


def _is_cell(session: Session, table: SpanTable, rows: list[int]) -> Tensor:
    assert session.layout is not None
    unknown = torch.tensor([not session.layout.spans[n].tiles for n in rows], device=table.mask.device)
    return (table.grid[..., 0] >= 0) | unknown[:, None]


@marked("signal")
def _tokens(
    session: Session,
    planned: PlannedCut,
    found: _Candidates,
    hidden: Tensor,
    call: LayerCall | None,
    needs: tuple[Need, ...],
) -> VisualTokens:
    assert session.layout is not None
    spans = [session.layout.spans[n] for n in found.rows]
    origin = found.table.origin.gather(1, found.order)
    wanted = Found(found.table, found.place, origin, found.size, found.mask, found.rows)
    gathered, words = signals.gather(session, planned, needs, hidden, call, wanted)
    grid = found.table.grid.gather(1, found.order[..., None].expand(-1, -1, 4))
    return VisualTokens(
        mask=found.mask,
        budget=torch.tensor(found.budget, device=hidden.device),
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
    )


def _links(spans: Sequence[Span]) -> tuple[tuple[int, ...], ...]:
    """Return for each span the numbers of the others of its sample."""
    return tuple(
        tuple(n for n, other in enumerate(spans) if other.sample == span.sample and other is not span) for span in spans
    )


@marked("select")
def _chosen(session: Session, planned: PlannedCut, found: _Candidates, keep: Tensor) -> Tensor:
    """Return bool (S, N) over all spans: what the reducer keeps, and all it was not asked about."""
    inside = torch.zeros_like(found.table.mask).scatter(1, found.order, keep & found.mask)
    asked = torch.zeros_like(found.table.mask).scatter(1, found.order, found.mask)
    if planned.reducer.separators != "drop":
        inside = inside | (found.table.mask & ~asked)
    if len(found.rows) == session.table.mask.shape[0]:
        return inside
    chosen = session.table.mask.clone()
    chosen[torch.tensor(found.rows, device=chosen.device)] = inside
    return chosen


@marked("select")
def _counts(session: Session, planned: PlannedCut, found: _Candidates, chosen: Tensor) -> tuple[int, ...]:
    """Return the tokens each span keeps; read from the device only where they depend on the content."""
    assert session.layout is not None
    if planned.decides or not planned.reducer.facts.known_count:
        return tuple(int(n) for n in (chosen & session.table.mask).sum(1).tolist())
    counts = list(session.table.current)
    for row, current, budget in zip(found.rows, found.current, found.budget, strict=True):
        others = 0 if planned.reducer.separators == "drop" else counts[row] - current
        counts[row] = others + planned.reducer.count(current, budget, session.layout.spans[row].tiles)
    return tuple(counts)


@marked("merge")
def _add_sizes(session: Session, found: _Candidates, assign: Tensor) -> None:
    """Count for each survivor what was merged into it."""
    table = session.table
    size = torch.ones_like(table.mask, dtype=torch.float32) if table.size is None else table.size.clone()
    rows = torch.tensor(found.rows, device=size.device)[:, None]
    size[rows, found.order] = ops.merged_size(assign, found.size)
    session.table = replace(table, size=size)


def _warn_left(session: Session, planned: PlannedCut, found: _Candidates, counts: tuple[int, ...]) -> None:
    """Warn where a rule leaves clearly more than asked: a tenth more, and more than each frame rounds up by."""
    assert session.layout is not None
    if planned.decides:
        return
    for row, current, asked in zip(found.rows, found.current, found.budget, strict=True):
        others = 0 if planned.reducer.separators == "drop" else session.table.current[row] - current
        left = counts[row] - others
        pieces = sum(tile.frames for tile in session.layout.spans[row].tiles)
        if left > asked + max((pieces + 1) // 2, 1, asked // 10):
            _warn(
                f"'{planned.name}' was asked to leave {asked} of the {current} tokens of a span, and leaves {left}: "
                f"{planned.reducer.why_more}. Ask for less, give more frames, or use a method that keeps any number."
            )
            return


def _warn_above(planned: PlannedCut, whole: list[int]) -> None:
    keep = planned.reducer.keep
    if isinstance(keep, int) and any(keep > length for length in whole):
        _warn(
            f"'{planned.name}' was asked to keep {keep} tokens of a span that has {min(whole)}; all of it is kept. "
            "Lower keep=, or give ratio= (the fraction removed)."
        )


def _warn(text: str) -> None:
    warnings.warn(text, SqueezeWarning, stacklevel=2)
