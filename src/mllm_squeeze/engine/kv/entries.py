"""Which of the tokens seen a KV layer holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeptEntries:
    """Which of the tokens seen a KV layer holds.

    columns: int64 (B, P), logical place of each held entry, ascending in each row. valid: bool (B, P) or None, False
    where a shorter row of a batch is padded on the left. seen: tokens seen when these were written; what is appended
    later is held in full. shift: int64 (B,), cut tokens per row, by which renumbered positions fall behind. tail:
    number of trailing entries that are consecutive tokens in every row. visual: bool (B, P), True for visual entries;
    None where nobody asks. repack: survivors were renumbered.
    """

    columns: Tensor
    valid: Tensor | None
    seen: int
    shift: Tensor
    tail: int
    visual: Tensor | None = None
    repack: bool = False

    @property
    def gap(self) -> int:
        """Tokens seen that hold no entry; the same in each row, since shorter ones are padded."""
        return self.seen - self.columns.shape[1]

    def rows(self, index: Tensor) -> KeptEntries:
        """Return the entries of other batch rows, as beam search reorders them."""
        index = index.to(self.columns.device)
        valid = None if self.valid is None else self.valid.index_select(0, index)
        visual = None if self.visual is None else self.visual.index_select(0, index)
        return KeptEntries(self.columns[index], valid, self.seen, self.shift[index], self.tail, visual, self.repack)

    def without_last(self, count: int) -> KeptEntries:
        """Return the entries but the last ones, which are consecutive tokens of every row."""
        valid = None if self.valid is None else self.valid[:, :-count]
        visual = None if self.visual is None else self.visual[:, :-count]
        return KeptEntries(
            self.columns[:, :-count], valid, self.seen - count, self.shift, self.tail - count, visual, self.repack
        )

    def extended(self, held: int) -> tuple[Tensor, Tensor | None]:
        """Return columns and validity of `held` entries, those appended since included."""
        extra = held - self.columns.shape[1]
        if extra <= 0:
            return self.columns, self.valid
        batch = self.columns.shape[0]
        new = torch.arange(self.seen, self.seen + extra, device=self.columns.device).expand(batch, -1)
        columns = torch.cat([self.columns, new], dim=1)
        if self.valid is None:
            return columns, None
        return columns, torch.cat([self.valid, self.valid.new_ones(batch, extra)], dim=1)
