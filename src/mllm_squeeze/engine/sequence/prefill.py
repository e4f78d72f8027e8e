"""A pass over a prompt with visual tokens: what is cut of it, and what comes out at full length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze import ops
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.sequence.shorten import gather_rows
from mllm_squeeze.engine.sequence.survivors import Left
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.engine.tokens.table import SpanTable, first_table
from mllm_squeeze.engine.trace import Attended, Cut, StageTrace
from mllm_squeeze.family.handlers.inner_features import InnerFeatures
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import Reduction


class Prefill(Pass):
    """State of one pass over a prompt with visual tokens.

    layout: where they are. features: what the encoders gave, by modality. past: tokens seen before. rows: of the
    prompt before generate() repeated them for beams, None outside of it. wanted: trailing tokens whose output is
    wanted, None for all. text: the words beside keys that are attended to from outside, (features (B, T, D), mask bool
    (B, T)); None where pictures and words stand in one sequence.
    """

    # Features that the text model would have added in front of inner layers, None in most families.
    inner: InnerFeatures | None = None
    # What was attended to from outside, None where pictures stand in the sequence.
    attended: Attended | None = None
    # Ids (B, T) of the prompt, where a text encoder is to read its words.
    ids: Tensor | None = None
    # The hidden states at full length, for the places that were cut; None where nobody wants them.
    _full: Tensor | None = None

    @marked("shorten")
    def __init__(
        self,
        plan: Plan,
        parts: ModelParts,
        layout: TokenLayout,
        features: Mapping[str, Features],
        device: torch.device,
        *,
        past: int = 0,
        rows: int | None = None,
        wanted: int | None = None,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(plan, parts, layout.length, past)
        self.layout, self.features = layout, features
        self.rows, self.wanted = rows, wanted
        self.text = None if text is None else (text[0].to(device), text[1].to(device))
        self.cuts: list[Cut] = []
        self.traces: list[StageTrace] = []
        self.table: SpanTable = first_table(layout, device)
        place, there = _words(layout)
        like = self.table.place
        self.text_place, self.text_mask = ops.on_device(place, like), ops.on_device(there, like)
        self.last_place = ops.on_device(layout.last, like)[:, None]
        self.real = ops.on_device(layout.real, like)
        self._padded = not bool(layout.real.all())
        self._tail = _tail(layout)
        self._row_lengths = [int(n) for n in layout.real.sum(1)]
        self._visual = ops.on_device(layout.visual, like)
        if plan.decode is not None:
            # A step that cuts while decoding leaves separators alone, and what it does not reduce.
            reduced = ops.on_device(layout.of(plan.decode.facts.modalities), like)
            self._visual = _pieces(layout, self.table, reduced)

    @property
    def stage(self) -> int:
        """Cuts that dropped something by now."""
        return len(self.cuts)

    @property
    def kept(self) -> Tensor:
        """Bool (B, T), the real tokens that are left."""
        if self.left is None:
            return self.real
        index, valid = self.left.index, self.left.valid
        valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        return torch.zeros_like(self.real).scatter(1, index, valid)

    @property
    def present(self) -> Tensor | None:
        """Bool (B, M) where tokens are real now, None where all are."""
        if self.left is not None:
            return self.left.valid
        return self.real if self._padded else None

    def with_inner(self, layer: int, hidden: Tensor) -> Tensor:
        """Add the features (`inner`) of a layer to the hidden states (B, M, D) in front of it."""
        return hidden if self.inner is None else self.inner.add(layer, hidden, self.index, self.valid)

    # Cutting

    @marked("shorten")
    def advance(self, layer: int, hidden: Tensor, chosen: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Drop all visual tokens but the chosen ones.

        hidden: (B, M, D). chosen: bool (S, N) over the table of now. counts: tokens each span keeps, on the host.
        Returns hidden states (B, M', D), shorter rows padded on the left.
        """
        batch, length, _ = hidden.shape
        there = self._there(batch, length, hidden.device)
        keep = self._keep_tokens(there, chosen)
        for span, before, after in zip(self.layout.spans, self.table.current, counts, strict=True):
            self._row_lengths[span.sample] -= before - after
        width = max(self._row_lengths)
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, length - width :]
        pad = ops.on_device([width - n for n in self._row_lengths], hidden)[:, None]
        if self.wanted is None or self.wanted > self._tail:
            self._full = self.restore(hidden)
        even = min(self._row_lengths) == width
        valid = None if even else torch.arange(width, device=hidden.device) >= pad
        self.left = self._left(order, valid, (there & ~keep).cumsum(1))
        self._move(keep.cumsum(1) - 1 + pad, chosen, counts)
        self.arguments.forget()
        self.cuts.append(Cut(layer, self.left.index, self.left.valid))
        return gather_rows(hidden, order)

    def _there(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return bool (B, M), False for padding."""
        if self.left is None:
            return self.real
        valid = self.left.valid
        return valid if valid is not None else torch.ones(batch, length, dtype=torch.bool, device=device)

    def _keep_tokens(self, there: Tensor, chosen: Tensor) -> Tensor:
        """Return bool (B, M): real text and the chosen visual tokens."""
        length, table = there.shape[1], self.table
        # Padding slots of a span write to a column of their own.
        keep = functional.pad(there, (0, 1))
        keep[table.sample[:, None], table.place.where(table.mask, length)] = chosen & table.mask
        return keep[:, :length]

    def _left(self, order: Tensor, valid: Tensor | None, gone: Tensor) -> Left:
        """Return what a cut leaves; order: int64 (B, M'). gone: int64 (B, M), tokens it drops in front of each."""
        left = self.left
        if left is None:
            return Left(order, valid, gone.gather(1, order), self._visual.gather(1, order), self._tail)
        shift, visual = (left.shift + gone).gather(1, order), left.visual.gather(1, order)
        return Left(left.index.gather(1, order), valid, shift, visual, self._tail)

    def _move(self, place: Tensor, chosen: Tensor, counts: tuple[int, ...]) -> None:
        """Note where tokens stand after a cut; place: int64 (B, M)."""
        rows = torch.arange(place.shape[0], device=place.device)[:, None]
        self.table = self.table.take(chosen, counts, place[self.table.sample[:, None], self.table.place])
        self.text_place = place[rows, self.text_place].clamp(min=0)
        self.last_place = place[rows, self.last_place]

    @marked("shorten")
    def restore(self, hidden: Tensor) -> Tensor:
        """Return states (B, T, D) at full length: survivors as they are now, the others as they were when cut.

        hidden: (B, M, D), of which nothing is changed where nothing was cut, or no more is wanted.
        """
        full, left = self._full, self.left
        if full is None or left is None or hidden.shape[1] != left.index.shape[1]:
            return hidden
        return _written(full.to(hidden.device), left.index, left.valid, hidden)

    def restore_earlier(self, hidden: Tensor) -> Tensor:
        """Return states (B, M, D) of any layer at full length, after the last cut; cut tokens as they were when cut.

        The latest of several cuts that leave as many tokens in the longest row is taken for that of the layer.
        """
        full = self._full
        made = next((cut for cut in reversed(self.cuts) if cut.index.shape[1] == hidden.shape[1]), None)
        if full is None or made is None or hidden.shape[1] == full.shape[1]:
            return hidden
        return _written(full.to(hidden.device), made.index, made.valid, hidden)

    def forget(self) -> None:
        """Let go of what only the pass needed, so that one kept for its report holds no activations."""
        self._full = self.inner = self.text = self.ids = None
        self.features = {}
        self.signals.forget()
        self.arguments.forget()

    # Merging

    @marked("merge")
    def merge(self, hidden: Tensor, reduction: Reduction, table: SpanTable, place: Tensor, mask: Tensor) -> Tensor:
        """Write merged states into the survivors' places.

        hidden: (B, M, D). place, mask: (S, N') of the candidates the reduction speaks of. Returns (B, M, D).
        """
        if not reduction.merges:
            return hidden
        sample = table.sample[:, None].expand(-1, place.shape[1])
        states = reduction.states(hidden[sample, place])
        write = mask & reduction.keep
        # Slots that do not survive write what stands there already.
        states = torch.where(write.unsqueeze(-1), states, hidden[sample, place].detach())
        target = torch.where(mask, place, place[:, :1])
        states = torch.where(mask.unsqueeze(-1), states, states[:, :1].detach())
        return hidden.index_put((sample, target), states)


def _written(full: Tensor, index: Tensor, valid: Tensor | None, hidden: Tensor) -> Tensor:
    """Return states (B, T, D) with others (B, M, D) in the columns (B, M), but those of padding."""
    columns = index.to(full.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    if valid is not None:
        hidden = torch.where(valid.to(full.device).unsqueeze(-1), hidden, full.gather(1, columns))
    return full.scatter(1, columns, hidden)


def _words(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Return int64 (B, R) and bool (B, R): columns of the prompt's words behind its first visual token."""
    columns = torch.arange(layout.length)
    behind = layout.prompt & ~layout.visual & (columns > torch.tensor(layout.first_visual)[:, None])
    count = behind.sum(1)
    there = torch.arange(max(int(count.max()), 1)) < count[:, None]
    place = torch.zeros(there.shape, dtype=torch.long).masked_scatter(there, behind.nonzero()[:, 1])
    return place, there


def _tail(layout: TokenLayout) -> int:
    """Return how many tokens stay in every row behind the last that a cut may take."""
    # A hole in the mask leaves with the first cut, as a visual token may; padding in front of all others does not.
    stays = ~layout.visual & (layout.real | (layout.real.cumsum(1) == 0))
    return int(stays.flip(1).long().cumprod(1).sum(1).min())


def _pieces(layout: TokenLayout, table: SpanTable, visual: Tensor) -> Tensor:
    """Return bool (B, T): visual (B, T) without separators, where the grid tells them."""
    known = ops.on_device([int(bool(span.tiles)) for span in layout.spans], visual)[:, None] > 0
    separators = functional.pad(torch.zeros_like(visual), (0, 1))
    apart = table.mask & known & (table.grid[..., 0] < 0)
    separators[table.sample[:, None], table.place.where(apart, visual.shape[1])] = True
    return visual & ~separators[:, :-1]
