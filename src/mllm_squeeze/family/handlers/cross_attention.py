"""Pictures outside of the LLM's sequence: the text attends to them in cross-attention layers (Mllama)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_squeeze.layout import Span, Tile, TokenLayout
from mllm_squeeze.upstream import injections
from mllm_squeeze.upstream.attended import CrossCall
from mllm_squeeze.upstream.prompts import PromptCall


def has_cross_attention(decoder: nn.Module) -> bool:
    """True where the text model attends to pictures that are no part of its sequence."""
    return injections.takes_cross_states(decoder)


def cross_layers(layers: nn.ModuleList) -> tuple[int, ...]:
    """Return the numbers of the decoder layers that attend to pictures."""
    return injections.cross_layers(layers)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch as the text model gets them.

    states: (B, K, D), picture after picture, tile after tile. shown: bool (B, pictures, tiles) on the CPU, False for
    tiles that only fill a picture up, and for all tiles of a picture that only fills its row up.
    """

    states: Tensor
    shown: Tensor

    @property
    def layout(self) -> TokenLayout:
        """One span per picture. A row without any picture is left as it is: nothing in it may be dropped."""
        batch, pictures, tiles = self.shown.shape
        patches = self.states.shape[1] // (pictures * tiles)
        spans: list[Span] = []
        for sample, picture in self.shown.any(-1).nonzero().tolist():
            here = self.shown[sample, picture].nonzero().flatten().tolist()
            start = picture * tiles
            runs = _runs([((start + tile) * patches, patches) for tile in here])
            item = sample * pictures + picture
            spans.append(Span(sample, "image", item, runs, _tile(patches) * len(here)))
        real = self.shown.flatten(1).repeat_interleave(patches, dim=1)
        real = real | ~real.any(1, keepdim=True)
        return TokenLayout(batch, self.states.shape[1], tuple(spans), real, keys=True)


def find_pictures(cross: CrossCall, batch: int, tiles: int, prompted: PromptCall) -> Pictures:
    """Return the pictures of a pass; the tiles that are shown are read from the device.

    cross: states (B * pictures * tiles, P, D); the last columns of its mask are these pictures. prompted: of the inner
    model. What is shown is said by the aspect ratios; the mask is asked where there are none, as it speaks of the words
    of this pass only.
    """
    states, mask, rows = cross.states, cross.mask, cross.rows
    assert states is not None
    patches = states.shape[1]
    pictures = states.shape[0] // (batch * tiles)
    shown = torch.ones(batch, pictures, tiles, dtype=torch.bool)
    ratios, ids = injections.shown_tiles(prompted.inputs)
    if ratios is not None:
        shown = ratios.cpu().view_as(shown).bool()
    elif mask is not None:
        seen = mask[..., mask.shape[-1] - pictures * tiles * patches :: patches] == 0
        seen = seen if rows is None else seen & (rows != 0)
        shown = seen.any(2).cpu().view_as(shown)
    if ids is not None:
        shown = shown & (ids.cpu() != 0).view(batch, pictures, 1)
    return Pictures(states.reshape(batch, -1, states.shape[-1]), shown)


def _tile(patches: int) -> tuple[Tile, ...]:
    """Return the square behind a tile's CLS token, () where it is none."""
    side = math.isqrt(patches - 1)
    return (Tile(1, side, side, frame_lead=1),) if side * side == patches - 1 else ()


def _runs(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join runs (start, length) that touch."""
    joined: list[tuple[int, int]] = []
    for start, length in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return tuple(joined)
