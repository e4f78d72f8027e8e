"""The way from encoder tokens to LLM tokens, found by experiment: which features move when an encoder token does.

Gradients through what lies behind the encoder's last block say so exactly, as a token that has no part in a feature has
a gradient of zero. Each encoder token that is used must make one feature; its number is read bit by bit, from the
gradients of the features that have the bit and of those that lack it, in two passes per bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.outputs import block_states, packed, projected, with_block_states

# So many kinds of prompts are remembered; a service that sees more sizes looks again now and then.
_MOST = 256


class SeenWays:
    """Finds, and remembers, which LLM token each encoder token makes, for the sizes that pictures come in.

    tower, block: the encoder, and its block behind which the way begins; of pictures where none is given.
    """

    def __init__(self, parts: ModelParts, tower: nn.Module | None = None, block: nn.Module | None = None) -> None:
        self._parts = parts
        self._tower, self._block = tower, block
        self._known: dict[Any, Tensor] = {}

    def carry(
        self,
        again: Callable[[], Any],
        modality: str,
        inputs: Mapping[str, Any],
        lengths: Sequence[int],
        values: Tensor,
        fill: float,
    ) -> list[Tensor]:
        """Carry values of encoder tokens to the LLM tokens of each feature item, as the mean over those that make it.

        again: runs the feature method once more. modality: of its items. inputs: of it. lengths: LLM tokens of each
        item. values: float32 (sum, C), of all encoder tokens in order. fill: of LLM tokens that none of them makes.

        Raises:
            UnsupportedModelError: an encoder token makes several LLM tokens or none does, or values are of others.
        """
        made = self.made(again, modality, inputs, lengths, len(values))
        return list(torch.split(mean_of_makers(values, made, sum(lengths), fill), list(lengths)))

    def made(
        self, again: Callable[[], Any], modality: str, inputs: Mapping[str, Any], lengths: Sequence[int], read: int
    ) -> Tensor:
        """Return int64 (P,), the number of the LLM token, of all items, that each encoder token makes, -1 for none.

        again, modality, inputs, lengths: as for `carry`. read: how many encoder tokens were read.

        Raises:
            UnsupportedModelError: as `carry`.
        """
        key = (modality, tuple(lengths), _shapes(inputs))
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = self._look(again, sum(lengths))
        found = self._known[key]
        if len(found) != read:
            raise self._refusal(f"its blocks read {read} tokens, and the last of them gives {len(found)}")
        return found

    def _look(self, again: Callable[[], Any], tokens: int) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            with _leaf_behind(*self._block_and_tower()) as leaves:
                output = again()
            side_by_side = packed(output)
            found = projected(output, self._parts.row.late) if side_by_side is None else [side_by_side]
            items = list(found) if isinstance(found, Tensor) else found
            if items is None or len(leaves) != 1:
                raise self._refusal("its features are not made in one pass of the encoder")
            features = torch.cat([item.reshape(-1, item.shape[-1]) for item in items])
            if len(features) != tokens or not features.requires_grad:
                raise self._refusal("its features do not depend on what the last block gives")
            made = self._made(features, leaves[0])
        return made

    def _block_and_tower(self) -> tuple[nn.Module, nn.Module]:
        if self._tower is not None and self._block is not None:
            return self._block, self._tower
        parts = self._parts
        assert parts.blocks is not None
        assert parts.tower is not None
        assert parts.feature_block is not None
        return parts.blocks[parts.feature_block], parts.tower

    def _made(self, features: Tensor, leaf: Tensor) -> Tensor:
        """Return int64 (P,), the number of the feature that each encoder token makes, -1 for none."""
        number = torch.arange(len(features), device=features.device)
        weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        made = torch.zeros(leaf.numel() // leaf.shape[-1], dtype=torch.long, device=leaf.device)
        used = torch.zeros_like(made, dtype=torch.bool)
        several = torch.zeros_like(used)
        for bit in range(max(1, (len(features) - 1).bit_length())):
            has = (number >> bit & 1).bool()
            with_bit, without = (_moved(features, leaf, weight * mask[:, None]) for mask in (has, ~has))
            made += with_bit.long() << bit
            used |= with_bit | without
            several |= with_bit & without
        if several.any():
            raise self._refusal(
                "a token of the encoder goes into several tokens of the LLM: into queries that look at all patches, or "
                "by windows that overlap"
            )
        if not used.any():
            raise self._refusal("no token of the encoder makes one of the LLM")
        return torch.where(used, made, -1)

    def _refusal(self, reason: str) -> UnsupportedModelError:
        encoder = "vision encoder" if self._tower is None else "audio encoder"
        return UnsupportedModelError(
            f"Values of the {encoder} of '{self._parts.row.model_type}' cannot be carried to the LLM's tokens, as an "
            f"experiment with its projector showed: {reason}. Use a method that reads nothing of the {encoder}.",
            avoid=["encoder attention"],
        )


@contextmanager
def _leaf_behind(block: nn.Module, tower: nn.Module) -> Iterator[list[Tensor]]:
    """Make what a block gives a leaf that gradients can be taken of; what comes before it keeps no gradients."""
    leaves: list[Tensor] = []

    def stop(_: nn.Module, __: Any) -> None:
        torch.set_grad_enabled(False)

    def go_on(_: nn.Module, __: Any, ___: Any) -> None:
        torch.set_grad_enabled(True)

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        torch.set_grad_enabled(True)
        leaves.append(block_states(output).detach().clone().requires_grad_())
        return with_block_states(output, leaves[-1])

    hooks = [
        tower.register_forward_pre_hook(stop),
        tower.register_forward_hook(go_on),
        # In front of the hooks by which transformers hands out hidden states.
        block.register_forward_hook(replace, prepend=True),
    ]
    try:
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()


def _moved(features: Tensor, leaf: Tensor, weight: Tensor) -> Tensor:
    """Return bool (P,), the encoder tokens on which a weighted sum of features depends."""
    (gradient,) = torch.autograd.grad(features, leaf, weight, retain_graph=True, allow_unused=True)
    if gradient is None:
        return torch.zeros(leaf.numel() // leaf.shape[-1], dtype=torch.bool, device=leaf.device)
    return (gradient != 0).any(-1).flatten()


def mean_of_makers(values: Tensor, made: Tensor, tokens: int, fill: float) -> Tensor:
    """Return (tokens, C), the mean of the values (P, C) that make each token, `fill` where none does."""
    made = made.to(values.device)
    place = torch.where(made < 0, tokens, made)
    total = values.new_zeros(tokens + 1, values.shape[-1]).index_add_(0, place, values)[:tokens]
    count = torch.bincount(place, minlength=tokens + 1)[:tokens, None]
    return torch.where(count > 0, total / count.clamp(min=1), fill)


def _shapes(inputs: Mapping[str, Any]) -> Any:
    """Return what the way may depend on: the shapes of tensors, and the values of those that do not hold pixels."""
    return tuple((name, _shape(value)) for name, value in sorted(inputs.items()))


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_floating_point():
        return tuple(value.shape)
    return tuple(value.shape), value.flatten().tolist().__repr__()
