"""Builds what a reducer sees from lists of unpadded spans; padding holds NaN, so that whoever reads it is caught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.base import Among, Signals, VisualTokens
from mllm_squeeze.reducers.needs import Attention, EncoderAttention, Features, Need


def pad(rows: Sequence[Tensor], width: int, value: float) -> Tensor:
    """Stack rows of different lengths."""
    out = torch.full((len(rows), width, *rows[0].shape[1:]), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def visual_tokens(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    tiles: Sequence[tuple[Tile, ...]] | None = None,
    signals: Mapping[Need, Sequence[Tensor]] | None = None,
    text: Mapping[Need, Sequence[Tensor]] | None = None,
    whole: Mapping[Need, Sequence[Tensor]] | None = None,
    lead: int = 0,
    special_tokens: int = 0,
    width: int | None = None,
) -> VisualTokens:
    """Return the padded batch of spans; `width` pads further.

    signals: of the visual tokens, which come first also where attention has axes of heads and rows. text: of the words,
    `Features("text")` too. whole: of all tokens, `lead` of which stand in front of the visual ones.
    """
    lengths = tuple(len(f) for f in features)
    width = width or max(lengths)
    grid = torch.full((len(lengths), width, 4), -1)
    for i, rectangles in enumerate(tiles or ()):
        cells = [(n, *c) if c[0] >= 0 else (-1,) * 4 for n, tile in enumerate(rectangles) for c in tile.coordinates()]
        if cells:
            grid[i, : lengths[i]] = torch.tensor(cells[: lengths[i]])  # a cut before leaves fewer tokens than cells
    visual = {need: turned(need, padded(evened(need, rows), width)) for need, rows in (signals or {}).items()}
    words = {need: turned(need, padded(evened(need, rows))) for need, rows in (text or {}).items()}
    every = {need: padded(rows) for need, rows in (whole or {}).items()}
    place = torch.arange(width).expand(len(lengths), width)
    among = {}
    for need, rows in (whole or {}).items():
        present = there([len(row) for row in rows])
        among[need] = Among(present, (lead + place).clamp(max=present.shape[1] - 1))
    return VisualTokens(
        mask=pad([torch.ones(n, dtype=torch.bool) for n in lengths], width, False),
        budget=torch.tensor(budgets),
        counts=tuple(budgets),
        grid=grid,
        origin=torch.arange(width).expand(len(lengths), width),
        lengths=lengths,
        current=lengths,
        tiles=tuple(tiles or ((),) * len(lengths)),
        special_tokens=special_tokens,
        sample=tuple(range(len(lengths))),
        modality=("video",) * len(lengths),
        signals=Signals({Features(): padded(features, width), **visual, **words, **every}),
        among=among,
        text_mask=there([len(row) for row in next(iter(text.values()))]) if text else None,
    )


def padded(rows: Sequence[Tensor], width: int | None = None) -> Tensor:
    value = float("nan") if rows[0].is_floating_point() else 99
    return pad(rows, width or max(len(row) for row in rows), value)


def turned(need: Need, signal: Tensor) -> Tensor:
    """Return attention with the visual tokens as its last axis, any other signal as it is."""
    return signal.movedim(1, -1) if isinstance(need, (Attention, EncoderAttention)) else signal


def evened(need: Need, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return attention of words with as many of them for each span, zero where there is none."""
    if getattr(need, "over_rows", "") != "each":
        return rows
    words = max(row.shape[-1] for row in rows)
    return [torch.nn.functional.pad(row, (0, words - row.shape[-1])) for row in rows]


def there(lengths: Sequence[int]) -> Tensor:
    return pad([torch.ones(n, dtype=torch.bool) for n in lengths], max(lengths), False)


def circle(*degrees: float) -> Tensor:
    """Return unit vectors at the given angles, (len(degrees), 2)."""
    angle = torch.tensor(degrees, dtype=torch.float64) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1).float()


def chosen(keep: Tensor, row: int = 0) -> list[int]:
    """Return the indices kept in one row."""
    return keep[row].nonzero()[:, 0].tolist()


def ragged(*lengths):
    """Return a mask bool (S, N) with so many tokens in each span."""
    return pad([torch.ones(n, dtype=torch.bool) for n in lengths], max(lengths), False)
