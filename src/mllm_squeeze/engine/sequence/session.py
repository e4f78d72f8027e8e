"""One pass through the decoder: what its taps read, what is cut, and what comes out at full length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_squeeze import ops
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.layer_arguments import LayerArguments
from mllm_squeeze.engine.sequence.shorten import gather_rows
from mllm_squeeze.engine.sequence.survivors import Survivors
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.spans import Features, SpanTable, first_table
from mllm_squeeze.engine.trace import Attended, Cut, StageTrace
from mllm_squeeze.family.handlers.inner_features import InnerFeatures
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import Reduction


@dataclass(frozen=True)
class OneRow:
    """The row (B, 1) that an attention module shall project, of a sequence of some length."""

    row: Tensor
    length: int


class Session(Survivors):
    """State of one decoder pass; it lives as long as the pass, what decode needs lives with the cache.

    layout: None where there is nothing to cut.
    """

    # Where keys are reduced that are attended to from outside: what was attended to, and the words beside the keys.
    attended: Attended | None = None
    text: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        plan: Plan,
        parts: ModelParts,
        layout: TokenLayout | None,
        features: Mapping[str, Features],
        width: int,
        past: int,
    ) -> None:
        super().__init__(plan, parts, width, past)
        self.layout, self.features = layout, features
        self.cuts: list[Cut] = []
        self.traces: list[StageTrace] = []
        # Sequence length of each layer in this pass, and the entries it held before.
        self.lengths: dict[int, int] = {}
        self.held: dict[int, int] = {}
        # What taps of this pass should read, by attention module, and what was read, by its source.
        self.listeners: dict[nn.Module, Any] = {}
        # Attention modules that shall project one row only, while they are asked for a preview.
        self.one_row: dict[nn.Module, OneRow] = {}
        self.read: dict[Any, Any] = {}
        self.row_weights: dict[int, Tensor] = {}
        # Features that the text model would have added in front of inner layers, None in most families.
        self.inner: InnerFeatures | None = None
        # The hidden states at full length, for the places that were cut; None where nobody wants them.
        self._full: Tensor | None = None
        # Trailing tokens whose output is wanted, None for all tokens.
        self.wanted: int | None = None
        self.stage = 0
        if layout is not None:
            self.row_lengths = [int(n) for n in layout.real.sum(1)]
        self.arguments = LayerArguments(self)

    @property
    def cutting(self) -> bool:
        """True in a prefill with visual tokens."""
        return self.layout is not None

    @marked("shorten")
    def prepare(self, device: torch.device) -> None:
        """Put the layout on the device: spans, text behind the first visual token, last token, padding."""
        layout = self.layout
        assert layout is not None
        self.table: SpanTable = first_table(layout, device)
        visual, real = layout.visual, layout.real
        columns = torch.arange(layout.length)
        behind = layout.prompt & ~visual & (columns > torch.tensor(layout.first_visual)[:, None])
        count = behind.sum(1)
        there = torch.arange(max(int(count.max()), 1)) < count[:, None]
        place = torch.zeros(there.shape, dtype=torch.long).masked_scatter(there, behind.nonzero()[:, 1])
        self.text_place = place.to(device)
        self.text_mask = there.to(device)
        self.last_place = torch.tensor(layout.last, device=device)[:, None]
        self.real, self.visual = real.to(device), visual.to(device)
        if self.plan.decode is not None:
            self.visual = self._pieces(self.visual)
        padded = not bool(real.all())
        # Bool (B, M) where tokens are real now, None where all are.
        self.present = self.real if padded else None
        # A hole in the mask leaves with the first cut, as a visual token may; padding in front of all others does not.
        stays = ~visual & (real | (real.cumsum(1) == 0))
        self.tail = int(stays.flip(1).long().cumprod(1).sum(1).min())

    def _pieces(self, visual: Tensor) -> Tensor:
        """Return bool (B, T): visual (B, T) without separators, where the grid tells them."""
        table = self.table
        known = torch.tensor([bool(span.tiles) for span in self._layout.spans], device=visual.device)[:, None]
        separators = functional.pad(torch.zeros_like(visual), (0, 1))
        apart = table.mask & known & (table.grid[..., 0] < 0)
        separators[table.sample[:, None], table.place.where(apart, visual.shape[1])] = True
        return visual & ~separators[:, :-1]

    # Cutting

    @marked("shorten")
    def advance(self, layer: int, hidden: Tensor, chosen: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Drop all visual tokens but the chosen ones.

        hidden: (B, M, D). chosen: bool (S, N) over the table of now. counts: tokens each span keeps, on the host.
        Returns hidden states (B, M', D), shorter rows padded on the left.
        """
        batch, length, _ = hidden.shape
        keep = self._keep_tokens(batch, length, chosen, hidden.device)
        for span, before, after in zip(self._layout.spans, self.table.current, counts, strict=True):
            self.row_lengths[span.sample] -= before - after
        width = max(self.row_lengths)
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, length - width :]
        pad = torch.tensor([width - n for n in self.row_lengths], device=hidden.device)[:, None]
        even = min(self.row_lengths) == width
        place = keep.cumsum(1) - 1 + pad

        was_there = self._was_there(batch, length, hidden.device)
        gone = (was_there & ~keep).cumsum(1)
        shift = gone if self.shift is None else self.shift + gone
        if self.wanted is None or self.wanted > self.tail:
            self._full = hidden if self.index is None else self._restored(hidden)
        self.index = order if self.index is None else self.index.gather(1, order)
        self.valid = None if even else torch.arange(width, device=hidden.device) >= pad
        self.present = self.valid
        self.visual = self.visual.gather(1, order)
        self.shift = shift.gather(1, order)
        rows = torch.arange(batch, device=hidden.device)[:, None]
        self.table = self.table.take(chosen, counts, place[self.table.sample[:, None], self.table.place])
        self.text_place = place[rows, self.text_place].clamp(min=0)
        self.last_place = place[rows, self.last_place]
        self.stage += 1
        self.arguments.forget()
        self.cuts.append(Cut(layer, self.index, self.valid))
        return gather_rows(hidden, order)

    @property
    def _layout(self) -> TokenLayout:
        assert self.layout is not None
        return self.layout

    def _was_there(self, batch: int, length: int, device: torch.device) -> Tensor:
        if self.index is None:
            return self.real
        return self.valid if self.valid is not None else torch.ones(batch, length, dtype=torch.bool, device=device)

    def _keep_tokens(self, batch: int, length: int, chosen: Tensor, device: torch.device) -> Tensor:
        """Return bool (B, M): real text and the chosen visual tokens."""
        keep = self._was_there(batch, length, device)
        table = self.table
        # Padding slots of a span write to a column of their own.
        keep = functional.pad(keep, (0, 1))
        keep[table.sample[:, None], table.place.where(table.mask, length)] = chosen & table.mask
        return keep[:, :length]

    def _restored(self, hidden: Tensor) -> Tensor:
        """Return the full-length states (B, T, D): survivors as they are now, the others as they were when cut."""
        assert self._full is not None
        assert self.index is not None
        full = self._full.to(hidden.device)
        index = self.index.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        if self.valid is not None:
            hidden = torch.where(self.valid.to(hidden.device).unsqueeze(-1), hidden, full.gather(1, index))
        return full.scatter(1, index, hidden)

    @marked("shorten")
    def restore(self, hidden: Tensor) -> Tensor:
        """Return the full-length output of the last layer; unchanged where nothing was cut, or no more is wanted."""
        if self._full is None or self.index is None or hidden.shape[1] != self.index.shape[1]:
            return hidden
        return self._restored(hidden)

    def forget(self) -> None:
        """Let go of what only the pass needed, so that a session kept for its report holds no activations."""
        self._full = None
        self.features = {}
        self.inner = None
        self.listeners.clear()
        self.read.clear()
        self.row_weights.clear()
        self.arguments.forget()

    # Merging

    @marked("merge")
    def merge(self, hidden: Tensor, reduction: Reduction, table: SpanTable, place: Tensor, mask: Tensor) -> Tensor:
        """Write merged states into the survivors' places.

        hidden: (B, M, D). place, mask: (S, N') of the candidates the reduction speaks of. Returns (B, M, D).
        """
        if reduction.assign is None:
            return hidden
        sample = table.sample[:, None].expand(-1, place.shape[1])
        weights = ops.mean_weights(reduction.assign) if reduction.weights is None else reduction.weights
        states = ops.merge_tokens(hidden[sample, place], reduction.assign, weights)
        write = mask & reduction.keep
        # Slots that do not survive write what stands there already.
        states = torch.where(write.unsqueeze(-1), states, hidden[sample, place].detach())
        target = torch.where(mask, place, place[:, :1])
        states = torch.where(mask.unsqueeze(-1), states, states[:, :1].detach())
        return hidden.index_put((sample, target), states)
