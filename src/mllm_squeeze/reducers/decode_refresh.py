"""While decoding, look only at the visual tokens that the last steps looked at: DyCoke's dynamic pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import DecodeReducer, Reduction, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


def refresh(
    row: Tensor, previous: Tensor | None, kept: Tensor | None, mask: Tensor, drop: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return (kept, stored): the visual tokens to attend to in this step, and the row to hand in at the next.

    row: (B, V), attention of the new token over the visual tokens, mean over heads. previous: the row stored before,
    kept: bool (B, V), the choice before; both None at the first step. mask: bool (B, V), False is padding. Where the
    cosine of row and previous is at least `threshold` the choice stays, else the int(V * (1 - drop)) of largest
    attention are taken (at least one), ties lowest index first; each row of the batch decides for itself, without a
    sync.
    """
    stored = row.detach().float().masked_fill(~mask, 0)
    # In whole billionths: 10 * (1 - 0.8) is 2, not 1.9999999999999996.
    limit = (mask.sum(1) * round((1 - drop) * 10**9)).div(10**9, rounding_mode="floor").clamp(min=1)
    chosen = ops.top_k_mask(stored, mask, limit)
    if previous is None or kept is None:
        return chosen, stored
    alike = (ops.unit(stored) * ops.unit(previous)).sum(1, keepdim=True) >= threshold
    return kept.where(alike, chosen), stored


class DecodeRefresh(DecodeReducer):
    """Let the layers from `layer` on attend, while decoding, only to the visual tokens that layer - 1 attends to.

    DyCoke, arXiv 2411.15024, stage two. drop: fraction of the visual tokens left out. threshold: the choice of the
    step before stays while the attention over the visual tokens is at least this similar (cosine). The full cache is
    retained, so tokens can come back. Separators (newlines) are no visual tokens here: they are always attended to, and
    neither counted nor compared.

    Differs from the authors' code: similar steps reuse the choice, as the paper says (the code then attends to all);
    each prompt starts anew (the code's state outlives a prompt, so that its first steps may be compared with the last
    ones of another); the number kept is exactly the whole part of V * (1 - drop) (the code's float falls short by one
    where that is a whole number: 10 * (1 - 0.8) keeps 1); a batch decides row by row.
    """

    reads_text: ClassVar[bool] = True

    drop: float = Field(default=0.8, ge=0, lt=1)
    threshold: float = Field(default=0.9, ge=-1, le=1)

    def refresh(self, row: Tensor, previous: Tensor | None, kept: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept, stored) for one decode step, see the function `refresh`."""
        return refresh(row, previous, kept, mask, self.drop, self.threshold)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Raise NotImplementedError: this reducer acts step by step, through `refresh`."""
        raise NotImplementedError("decode_refresh acts while decoding: call refresh with each step's attention")
