"""Finds the visual spans of a prompt, and follows their tokens through the cuts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mllm_squeeze.engine.timing import marked
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError
from mllm_squeeze.layout import Span, Tile, TokenLayout
from mllm_squeeze.reducers.base import Reducer
from mllm_squeeze.reducers.needs import Need

# What a token carries that stands for no token of the encoder: it stays, or goes.
SEPARATOR, PRUNED = -1, -2


@dataclass(frozen=True)
class Features:
    """What the encoder gave for one modality: visual tokens and tiles per item, and signals per token of each item.

    lengths: None where the encoder does not tell; then each unbroken run of placeholders is an item.
    """

    modality: str
    lengths: tuple[int, ...] | None
    tiles: tuple[tuple[Tile, ...], ...] = ()
    signals: Mapping[Need, tuple[Tensor, ...]] = field(default_factory=dict)
    # Of a reduction inside the encoder, int64 (length,) per item: the encoder's token that each one carries, SEPARATOR
    # or PRUNED; the cut of those that carry the same happens before layer 0.
    groups: tuple[Tensor, ...] | None = None
    # The reducer that worked inside the encoder, None where none did.
    merged_by: Reducer | None = None

    def without(self, left: Tensor | None) -> Features:
        """Return the features that a family leaves itself of those it encoded; left: bool (sum of lengths,) or None.

        An item that lost some is no rectangle any more.
        """
        if left is None or self.lengths is None or bool(left.all()):
            return self
        rows = torch.split(left.cpu().bool(), list(self.lengths))
        return replace(
            self,
            lengths=tuple(int(row.sum()) for row in rows),
            tiles=tuple(tiles if bool(row.all()) else () for tiles, row in zip(self.tiles, rows, strict=True)),
            signals={need: _taken(values, rows) for need, values in self.signals.items()},
            groups=None if self.groups is None else _taken(self.groups, rows),
        )


def _taken(values: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value[row.to(value.device)] for value, row in zip(values, rows, strict=True))


@marked("shorten")
def find_layout(
    ids: Tensor,
    real: Tensor | None,
    features: Mapping[str, Features],
    token_ids: Mapping[str, int],
    grouped: Sequence[str],
    types: Tensor | None = None,
    drafts: int = 0,
) -> TokenLayout:
    """Return where the spans of a batch are.

    ids: int64 (B, T). real: bool (B, T) or None. features: per modality. token_ids: placeholder id per modality.
    grouped: modalities whose neighbouring items are tiles of one picture. types: int (B, T), 1 image and 2 video, which
    tells modalities with one id apart. drafts: trailing tokens that are no prompt. One device-to-host copy.

    Raises:
        UnsupportedInputError: placeholders and features do not match, as in a prefill that is split into chunks.
    """
    ids = ids.cpu()
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.cpu().bool()
    spans: list[Span] = []
    for modality, found in features.items():
        placeholder = ids == token_ids[modality]
        twins = [other for other in features if other != modality and token_ids[other] == token_ids[modality]]
        if twins:
            placeholder &= _of_type(types, modality, ids)
        spans += _spans_of(placeholder, found, modality in grouped)
    spans.sort(key=lambda span: (span.sample, span.start))
    if not bool(real.all()):
        there = [_without_holes(span, real[span.sample]) for span in spans]
        if spans and not any(there):
            warnings.warn("The attention mask hides all visual tokens; nothing was cut.", SqueezeWarning, stacklevel=2)
        spans = [span for span in there if span is not None]
    return TokenLayout(ids.shape[0], ids.shape[1], tuple(spans), real, drafts)


def _of_type(types: Tensor | None, modality: str, ids: Tensor) -> Tensor:
    if types is None:
        raise UnsupportedInputError(
            "Images and videos of this family share one placeholder id. Pass mm_token_type_ids, as the processor gives "
            "them, or prompt with one modality at a time."
        )
    return types.cpu()[:, -ids.shape[1] :] == (2 if modality == "video" else 1)


def _spans_of(placeholder: Tensor, features: Features, grouped: bool) -> list[Span]:
    if features.lengths is None:
        return _spans_by_runs(placeholder, features.modality)
    sample, column = placeholder.nonzero(as_tuple=True)
    lengths = features.lengths
    repeats, rest = divmod(len(column), max(sum(lengths), 1))
    if not lengths or rest or repeats < 1:
        raise UnsupportedInputError(
            f"The prompt holds {len(column)} {features.modality} placeholders, the encoder gave {sum(lengths)} tokens. "
            "A prefill in chunks cannot be squeezed: leave prefill_chunk_size unset."
        )
    items = [item for item in _expanded(placeholder.sum(1).tolist(), lengths, repeats) if lengths[item]]
    sizes = torch.tensor([lengths[item] for item in items])
    ends = sizes.cumsum(0)
    first, last = sample[ends - sizes].tolist(), sample[ends - 1].tolist()
    runs = _runs(torch.arange(len(items)).repeat_interleave(sizes), column)
    spans = []
    for n, item in enumerate(items):
        if first[n] != last[n]:
            raise UnsupportedInputError(
                f"{features.modality} item {item} has placeholders in samples {first[n]} to {last[n]}; each image or "
                "video must stand in one prompt."
            )
        spans.append(Span(first[n], features.modality, item, tuple(runs[n]), features.tiles[item]))
    return _merge_adjacent(spans) if grouped else spans


def _spans_by_runs(placeholder: Tensor, modality: str) -> list[Span]:
    found = _runs(*placeholder.nonzero(as_tuple=True))
    pieces = [(sample, run) for sample, runs in found.items() for run in runs]
    return [Span(sample, modality, n, (run,)) for n, (sample, run) in enumerate(pieces)]


def _expanded(per_row: Sequence[int], lengths: Sequence[int], repeats: int) -> list[int]:
    """Return the item behind each group of placeholders: beams repeat the items of a sample row after row.

    per_row: placeholders of each row of the batch.
    """
    if repeats == 1:
        return list(range(len(lengths)))
    order: list[int] = []
    start = 0
    for need in [count for count in per_row if count][::repeats]:
        end = start
        while need > 0:
            need -= lengths[end]
            end += 1
        order += list(range(start, end)) * repeats
        start = end
    return order


def _without_holes(span: Span, real: Tensor) -> Span | None:
    """Return what is there of a span, None where nothing is; real: bool (T,), False where the mask hides a token."""
    if all(bool(real[start : start + length].all()) for start, length in span.runs):
        return span
    columns = torch.tensor(span.columns)
    origin = real[columns].nonzero().flatten()
    if not len(origin):
        return None
    (runs,) = _runs(torch.zeros_like(origin), columns[origin]).values()
    return replace(span, runs=tuple(runs), tiles=(), origin=tuple(origin.tolist()))


def _runs(owner: Tensor, column: Tensor) -> dict[int, list[tuple[int, int]]]:
    """Return the unbroken runs of columns of each owner, (start, length) each; owner, column: int64 (P,), in order."""
    begins = torch.ones_like(owner, dtype=torch.bool)
    begins[1:] = (owner[1:] != owner[:-1]) | (column[1:] != column[:-1] + 1)
    first = begins.nonzero().flatten()
    lengths = torch.diff(first, append=torch.tensor([len(owner)]))
    runs: dict[int, list[tuple[int, int]]] = {}
    for one, start, length in zip(owner[first].tolist(), column[first].tolist(), lengths.tolist(), strict=True):
        runs.setdefault(one, []).append((start, length))
    return runs


def _merge_adjacent(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and last.sample == span.sample and sum(last.runs[-1]) == span.start:
            runs = (*last.runs[:-1], (last.runs[-1][0], last.runs[-1][1] + span.length))
            tiles = _frames(last, span) if span.modality == "video" else last.tiles + span.tiles
            merged[-1] = Span(last.sample, last.modality, last.item, runs, tiles, last.items + span.items)
        else:
            merged.append(span)
    return merged


def _frames(last: Span, span: Span) -> tuple[Tile, ...]:
    """Join frames of equal geometry into one tile."""
    if len(last.tiles) != 1 or len(span.tiles) != 1:
        return last.tiles + span.tiles
    one, other = last.tiles[0], span.tiles[0]
    if replace(one, frames=other.frames) != other:
        return last.tiles + span.tiles
    return (replace(one, frames=one.frames + other.frames),)


@dataclass(frozen=True)
class SpanTable:
    """The visual tokens of all spans, padded to the longest, as they stand in the sequence now.

    sample: int64 (S,). place: int64 (S, N), column in the sequence of now. mask: bool (S, N). origin: int64 (S, N),
    place in the span before any cut. grid: int64 (S, N, 4). current: tokens per span, on the host. size: float32
    (S, N), how many tokens each one stands for by now; None while nothing was merged, or nobody asks.
    """

    sample: Tensor
    place: Tensor
    mask: Tensor
    origin: Tensor
    grid: Tensor
    current: tuple[int, ...]
    size: Tensor | None = None

    def rows(self, rows: Sequence[int]) -> SpanTable:
        """Return the table of some spans."""
        pick = torch.tensor(rows, device=self.sample.device)
        return SpanTable(
            self.sample[pick],
            self.place[pick],
            self.mask[pick],
            self.origin[pick],
            self.grid[pick],
            tuple(self.current[n] for n in rows),
            None if self.size is None else self.size[pick],
        )

    def take(self, chosen: Tensor, current: tuple[int, ...], place: Tensor) -> SpanTable:
        """Keep the chosen tokens (bool (S, N)) in order; `place` are the columns they have now."""
        width = max(current, default=0)
        order = (~(chosen & self.mask)).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        mask = (chosen & self.mask).gather(1, order)
        return SpanTable(
            self.sample,
            place.gather(1, order),
            mask,
            self.origin.gather(1, order),
            self.grid.gather(1, order[..., None].expand(-1, -1, 4)),
            current,
            None if self.size is None else self.size.gather(1, order),
        )

    def order(self, chosen: Tensor, width: int) -> Tensor:
        """Return int64 (S, width): the chosen tokens first, in order."""
        return (~(chosen & self.mask)).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def first_table(layout: TokenLayout, device: torch.device) -> SpanTable:
    """Return the table of all visual tokens of a prompt; tokens stand at their columns."""
    current = tuple(span.length for span in layout.spans)
    origin = torch.arange(max(current)).expand(len(current), -1)
    mask = origin < torch.tensor(current)[:, None]
    place = torch.zeros_like(origin)
    place[mask] = _columns([run for span in layout.spans for run in span.runs])
    if any(span.origin is not None for span in layout.spans):
        origin = origin.clone()
        for row, span in enumerate(layout.spans):
            if span.origin is not None:
                origin[row, : span.length] = torch.tensor(span.origin)
    grid = torch.full((*mask.shape, 4), -1)
    for tiles in {span.tiles for span in layout.spans if span.tiles}:
        cells = torch.cat([_cells(n, tile) for n, tile in enumerate(tiles)])
        grid[[span.tiles == tiles for span in layout.spans], : len(cells)] = cells
    sample = torch.tensor([span.sample for span in layout.spans])
    return SpanTable(sample.to(device), place.to(device), mask.to(device), origin.to(device), grid.to(device), current)


def _columns(runs: Sequence[tuple[int, int]]) -> Tensor:
    """Return int64 (P,), the columns of some runs, one after the other."""
    start, length = torch.tensor(runs).unbind(1)
    before = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + (start - before).repeat_interleave(length)


def _cells(number: int, tile: Tile) -> Tensor:
    """Return int64 (N, 4): tile, frame, row and column of each token of a tile, -1 for separators."""
    cells = torch.full((tile.length, 4), -1)
    frames = cells[: tile.length - tile.tail].unflatten(0, (tile.frames, -1))[:, tile.frame_lead :]
    inside = frames.unflatten(1, (tile.height, -1))[:, :, : tile.width]
    inside[..., 0] = number
    inside[..., 1] = torch.arange(tile.frames)[:, None, None]
    inside[..., 2] = torch.arange(tile.height)[:, None]
    inside[..., 3] = torch.arange(tile.width)
    return cells
