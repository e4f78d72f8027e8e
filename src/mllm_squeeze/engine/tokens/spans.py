"""Finds the visual spans of a prompt by its placeholders."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError
from mllm_squeeze.layout import Span, Tile, TokenLayout


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
