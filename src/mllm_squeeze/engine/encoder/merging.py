"""Reductions inside the vision encoder: it runs on fewer and fewer tokens, the LLM gets the full count back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.amount import Amount
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.engine.tokens.features import PRUNED, SEPARATOR
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.family.tower_to_llm import to_llm_tokens
from mllm_squeeze.reducers.base import Reducer, Signals, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Projection, Size


class EncoderMerge:
    """State of one call of the encoder: which patch is part of which token by now, and which were pruned.

    amount: how much of each tile's tokens is left. blocks: numbers of the blocks in front of which tokens are reduced,
    with the keys of the block before.
    """

    def __init__(self, parts: ModelParts, reducer: Reducer, amount: Amount, blocks: Sequence[int]) -> None:
        self.parts, self.reducer, self.amount, self.blocks = parts, reducer, amount, list(blocks)
        self._keys: Tensor | None = None
        self._sizes: Tensor | None = None
        self._source: Tensor | None = None
        self._schedule: Sequence[int] = ()

    def read(self, call: AttentionCall) -> bool:
        """Keep the keys of a block, mean over heads."""
        self._keys = call.key.mean(1)[:, self.parts.special_tokens :]
        return False

    @property
    def bias(self) -> Tensor | None:
        """Log sizes (tiles, 1, 1, special + N) for proportional attention, None where it is off."""
        if not getattr(self.reducer, "proportional", False) or self._sizes is None:
            return None
        ones = self._sizes.new_ones(self._sizes.shape[0], self.parts.special_tokens)
        return torch.cat([ones, self._sizes], dim=1).log()[:, None, None, :]

    def merge(self, block: int, hidden: Tensor) -> Tensor:
        """Reduce tokens in front of a block; hidden states (tiles, special + N, C) become (tiles, special + N', C)."""
        special, patches = hidden.tensor_split([self.parts.special_tokens], dim=1)
        tiles, count, _ = patches.shape
        if self._source is None or self._sizes is None:
            self._start(tiles, count, hidden.device)
        assert self._source is not None
        assert self._sizes is not None
        left = self._schedule[self.blocks.index(block)]
        if left >= count:
            return hidden
        reduction = self.reducer.reduce(self._tokens(patches, left))
        merged = reduction.states(patches)
        order = (~reduction.keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :left]
        place = _followed(reduction.keep.cumsum(1) - 1, reduction.targets())
        self._source = _followed(place, self._source)
        self._sizes = reduction.sizes(self._sizes).gather(1, order)
        short = merged.gather(1, order[..., None].expand(-1, -1, merged.shape[-1]))
        return torch.cat([special, short], dim=1)

    def _start(self, tiles: int, count: int, device: torch.device) -> None:
        self._source = torch.arange(count, device=device).expand(tiles, -1)
        self._sizes = torch.ones(tiles, count, device=device)
        (goal,) = self.amount.of_prompt((count,))
        self._schedule = schedule(count, goal, len(self.blocks), self.reducer)
        if self._schedule and self._schedule[-1] > goal:
            warnings.warn(
                f"Each block can merge at most half of its tokens, so {len(self.blocks)} leave {self._schedule[-1]} of "
                f"{count} patches instead of {goal}. Ask for a smaller ratio.",
                SqueezeWarning,
                stacklevel=2,
            )

    def _tokens(self, patches: Tensor, left: int) -> VisualTokens:
        assert self._keys is not None
        assert self._sizes is not None
        tiles, count, _ = patches.shape
        there: dict[Need, Tensor] = {Features(): patches, Projection(heads="mean"): self._keys, Size(): self._sizes}
        mask = torch.ones(tiles, count, dtype=torch.bool, device=patches.device)
        return VisualTokens(
            mask=mask,
            budget=torch.full((tiles,), left, device=patches.device),
            counts=(left,) * tiles,
            grid=torch.full((tiles, count, 4), -1, device=patches.device),
            origin=torch.arange(count, device=patches.device).expand(tiles, -1),
            lengths=(self._source.shape[1] if self._source is not None else count,) * tiles,
            current=(count,) * tiles,
            special_tokens=self.parts.special_tokens,
            signals=Signals(there),
        )

    def restore(self, projected: Tensor) -> Tensor:
        """Give each patch the projected feature of the token it is part of; (tiles, N', D) becomes (tiles, N, D).

        One that was pruned gets that of the first token, which the LLM never sees.
        """
        if self._source is None or self._sizes is None:
            return projected
        special = projected.shape[1] - self._sizes.shape[1]
        index = self._source.clamp(min=0)[..., None].expand(-1, -1, projected.shape[-1])
        return torch.cat([projected[:, :special], projected[:, special:].gather(1, index)], dim=1)

    def groups(self, modality: str, inputs: Mapping[str, Any], lengths: Sequence[int]) -> tuple[Tensor, ...] | None:
        """Return int64 (length,) per item: the encoder's token that each LLM token carries, SEPARATOR or PRUNED.

        Raises:
            UnsupportedInputError: the family mixes neighbouring tokens of such a picture, so groups are not whole
            tokens.
        """
        if self._source is None:
            return None
        tiles, count = self._source.shape
        numbers = torch.arange(tiles * count, device=self._source.device, dtype=torch.float32).view(tiles, count, 1)
        first = torch.arange(tiles, device=self._source.device)[:, None] * count
        groups = (self._source + first).masked_fill(self._source < 0, PRUNED).flatten()
        items = to_llm_tokens(self.parts, modality, inputs, lengths, numbers, fill=-1.0)
        return tuple(_groups_of(item[:, 0], groups) for item in items)


def _followed(place: Tensor, source: Tensor) -> Tensor:
    """Return place[source] row by row, PRUNED where either is."""
    return place.gather(1, source.clamp(min=0)).masked_fill(source < 0, PRUNED)


def _groups_of(number: Tensor, groups: Tensor) -> Tensor:
    """Return the group of each patch, by number (length,), -1 for separators."""
    if bool((number != number.round()).any()):
        raise UnsupportedInputError(
            "This family blends neighbouring patches of so large a picture, so tokens merged in the encoder are no "
            "longer whole. Use a smaller picture, or a method that acts at the projector."
        )
    return groups[number.long().clamp(min=0)].masked_fill(number < 0, SEPARATOR)


def schedule(count: int, goal: int, blocks: int, reducer: Reducer) -> tuple[int, ...]:
    """Return the tokens left in front of each of `blocks` blocks, as even as one block's limit allows."""
    left, out = count, []
    for block in range(blocks):
        want = left - -(-(left - goal) // (blocks - block))
        left = reducer.count(left, max(want, goal), ())
        out.append(left)
    return tuple(out)
