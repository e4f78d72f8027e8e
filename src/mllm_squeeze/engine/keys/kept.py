"""Reduces keys that are attended to from outside: by the text in cross-attention layers, by the queries of a Q-Former.

Keys have no positions and no order, so a reduction takes rows of them, and columns of the mask over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_squeeze.engine import cut as cutting
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream import masks


@dataclass(frozen=True)
class KeptKeys:
    """Which keys are left.

    index: int64 (B, M), columns of the dense keys. valid: bool (B, M) or None, False where a shorter row is padded.
    width: number of dense keys.
    """

    index: Tensor
    valid: Tensor | None
    width: int

    def rows(self, index: Tensor) -> KeptKeys:
        """Return the keys of other batch rows, as beam search reorders them."""
        index = index.to(self.index.device)
        valid = None if self.valid is None else self.valid.index_select(0, index)
        return KeptKeys(self.index.index_select(0, index), valid, self.width)

    def joined(self, new: KeptKeys) -> KeptKeys:
        """Return these keys with those of a later turn behind them."""
        index = torch.cat([self.index.to(new.index.device), new.index + self.width], dim=1)
        valid = None
        if self.valid is not None or new.valid is not None:
            pairs = ((self.valid, self.index), (new.valid, new.index))
            parts = [torch.ones_like(i, dtype=torch.bool) if v is None else v for v, i in pairs]
            valid = torch.cat([part.to(index.device) for part in parts], dim=1)
        return KeptKeys(index, valid, self.width + new.width)


def all_keys(batch: int, width: int, device: torch.device) -> KeptKeys:
    """Return the keys of a pass that drops none."""
    return KeptKeys(torch.arange(width, device=device).expand(batch, -1), None, width)


def reduce_keys(
    parts: ModelParts,
    plan: Plan,
    layout: TokenLayout,
    states: Tensor,
    text: tuple[Tensor, Tensor] | None = None,
    past: int = 0,
    rows: int | None = None,
) -> tuple[Prefill, Tensor, KeptKeys | None]:
    """Run the cuts of a plan on keys that are still to be projected.

    states: (B, K, D). layout: spans in them. text: (features (B, T, D), mask bool (B, T)) for reducers that read the
    words. past, rows: as for `Prefill`. Returns what was done, states (B, M, D), and what is left, None where nothing
    was cut.
    """
    prefill = Prefill(plan, parts, layout, {}, states.device, past=past, rows=rows, text=text)
    for cut in plan.keys:
        states = cutting.run_cut(prefill, cut, states)
    prefill.forget()
    left = prefill.left
    return prefill, states, None if left is None else KeptKeys(left.index, left.valid, layout.length)


@marked("shorten")
def take_columns(mask: Tensor, rows: Tensor | None, kept: KeptKeys) -> tuple[Tensor, Tensor | None]:
    """Return a mask over the keys that are left, and which words still see a picture.

    mask: (B, 1, T, K), of bools or added to the attention. rows: (B, 1, T, 1) or None, 0 where a word sees no picture;
    its row of the mask is then open. A word whose tiles lost all their keys becomes such a word.

    Raises:
        UnsupportedInputError: a mask of another form.
    """
    if masks.form(mask) != "square":
        raise UnsupportedInputError(
            f"The mask over the pictures' keys is of shape {tuple(mask.shape)}; expected (batch, 1, words, keys)."
        )
    index = kept.index.to(mask.device)
    mask = mask.gather(-1, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    closed = None if kept.valid is None else ~kept.valid.to(mask.device)[:, None, None]
    if rows is not None:
        seen = masks.is_open(mask) if closed is None else masks.is_open(mask) & ~closed
        sees = seen.any(-1, keepdim=True)
        mask, rows = masks.open_to(mask, ~sees), rows * sees.type_as(rows)
    return (mask if closed is None else masks.close(mask, closed)), rows


def take_row_mask(mask: Tensor | None, kept: KeptKeys) -> Tensor | None:
    """Return a mask (B, K) of the dense keys, 0 where closed, for those that are left; None where all are open."""
    if mask is None:
        return None if kept.valid is None else kept.valid.long()
    taken = mask.gather(1, kept.index.to(mask.device))
    return taken if kept.valid is None else taken * kept.valid.to(taken.device).type_as(taken)


def open_mask(kept: KeptKeys, tokens: int, dtype: torch.dtype) -> Tensor | None:
    """Return the mask (B, 1, T, M) by which every word sees all keys but padded ones, None where no mask does that.

    Without a mask sdpa reads several words as a causal sequence, and would close keys by their place.
    """
    if kept.valid is None and tokens == 1:
        return None
    shape = (kept.index.shape[0], 1, tokens, kept.index.shape[1])
    mask = torch.zeros(shape, dtype=dtype, device=kept.index.device)
    return mask if kept.valid is None else masks.close(mask, ~kept.valid[:, None, None])
