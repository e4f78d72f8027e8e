"""Where the visual spans, the text and the padding are in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch


@dataclass(frozen=True)
class Tile:
    """A rectangle of visual tokens in raster order: frames x height x width, separators between rows or at the end.

    `row_separators` counts the separator features after each row (LLaVA-NeXT newlines), `frame_lead` those before each
    frame (Video-LLaVA keeps the CLS token), `tail` those after the last row.
    """

    frames: int
    height: int
    width: int
    row_separators: int = 0
    frame_lead: int = 0
    tail: int = 0

    @property
    def cells(self) -> int:
        """Number of tokens that show a piece of the picture."""
        return self.frames * self.height * self.width

    @property
    def length(self) -> int:
        """Number of tokens, separators included."""
        per_frame = self.frame_lead + self.height * (self.width + self.row_separators)
        return self.frames * per_frame + self.tail

    def coordinates(self) -> list[tuple[int, int, int]]:
        """Return (t, h, w) of each token in order, (-1, -1, -1) for a separator."""
        none = (-1, -1, -1)
        out: list[tuple[int, int, int]] = []
        for t in range(self.frames):
            out += [none] * self.frame_lead
            for h in range(self.height):
                out += [(t, h, w) for w in range(self.width)]
                out += [none] * self.row_separators
        return out + [none] * self.tail


@dataclass(frozen=True)
class Span:
    """One image or one video in one sample.

    `runs` are the (start, length) pieces of the prompt that hold its tokens, in columns of the padded prompt; text may
    stand between them (timestamps between frames). `item` is the number of the image or video in its modality, in the
    order in which the model got the features (the first of `items`, where each tile of a picture is an item of its
    own); `tiles` describe the grid, or are empty where it is not known. Tokens that the attention mask hides are no
    part of a span: they are neither counted nor kept. Where there are such holes, `tiles` are empty, since the span is
    no rectangle any more, and `origin` holds the place of each token among all that the encoder gave for the span.
    """

    sample: int
    modality: str
    item: int
    runs: tuple[tuple[int, int], ...]
    tiles: tuple[Tile, ...] = ()
    items: int = 1
    origin: tuple[int, ...] | None = None

    @property
    def start(self) -> int:
        """First column."""
        return self.runs[0][0]

    @property
    def length(self) -> int:
        """Number of visual tokens; a budget is a part of these."""
        return sum(length for _, length in self.runs)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Column of each token, ascending."""
        return tuple(c for start, length in self.runs for c in range(start, start + length))

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(T, H, W) where the span is one rectangle, else None."""
        if len(self.tiles) != 1:
            return None
        return self.tiles[0].frames, self.tiles[0].height, self.tiles[0].width


@dataclass(frozen=True)
class TokenLayout:
    """Spans, text and padding of one batch of prompts.

    batch, length: shape of the padded prompt. spans: in the order (sample, first column). real: bool (batch, length) on
    the CPU, False where a token is padding or a hole in the attention mask. drafts: trailing tokens that are guesses of
    assisted decoding, not prompt. keys: True where visual tokens are no part of the prompt but keys that it attends to
    (Mllama), or that the queries of a Q-Former attend to; columns are then those of the keys, and a sample is a row of
    them.
    """

    batch: int
    length: int
    spans: tuple[Span, ...]
    real: torch.Tensor
    drafts: int = 0
    keys: bool = False

    @cached_property
    def prompt(self) -> torch.Tensor:
        """Bool (batch, length) on the CPU, True for real tokens of the prompt."""
        mask = self.real.clone()
        mask[:, self.length - self.drafts :] = False
        return mask

    @cached_property
    def visual(self) -> torch.Tensor:
        """Bool (batch, length) on the CPU, True where a token is visual."""
        return self.of({span.modality for span in self.spans})

    def of(self, modalities: Collection[str]) -> torch.Tensor:
        """Return bool (batch, length) on the CPU, True where a token is of one of some modalities."""
        mask = self.real.new_zeros(self.real.shape)
        for span in self.spans:
            for start, length in span.runs if span.modality in modalities else ():
                mask[span.sample, start : start + length] = True
        return mask

    @cached_property
    def last(self) -> tuple[int, ...]:
        """Column of the last prompt token of each sample."""
        flipped = self.prompt.long().flip(-1).argmax(-1)
        return tuple(int(self.length - 1 - c) for c in flipped)

    @cached_property
    def first_visual(self) -> tuple[int, ...]:
        """Column of the first visual token of each sample, `length` where there is none."""
        starts = [self.length] * self.batch
        for span in self.spans:
            starts[span.sample] = min(starts[span.sample], span.start)
        return tuple(starts)
