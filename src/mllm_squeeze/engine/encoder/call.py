"""One call of a family's feature method: what is read in the encoder meanwhile, carried to the tokens it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.engine.encoder.blocks import block_of, is_of_states
from mllm_squeeze.engine.encoder.merging import EncoderMerge
from mllm_squeeze.engine.encoder.pushed import read_sensitivity
from mllm_squeeze.engine.encoder.read import read_attention, read_probe, read_projection, read_states, real_keys
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.grids import find_tiles, with_breaks
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.family.tower_to_llm import to_llm_tokens
from mllm_squeeze.reducers.needs import Embedding, EncoderAttention, EncoderProjection, EncoderStates, Need, Sensitivity
from mllm_squeeze.upstream.outputs import projected
from mllm_squeeze.upstream.shared_space import place_of

# Carries values (tiles, N, C) or (sum, C) of tower tokens to the LLM's tokens of each item; the number is that of
# separators.
Carry = Callable[[Tensor, float], Sequence[Tensor]]
# The same of a call: its modality, its inputs, the LLM tokens of each item, and then values (sum, C) and the number.
SeenCarry = Callable[[str, Mapping[str, Any], Sequence[int], Tensor, float], Sequence[Tensor]]


class EncodeCall:
    """Collects encoder signals while a feature method runs.

    wanted: the signals that the plan's reducers read. merge: the reduction that runs inside the encoder, None without
    one. text_encoder: into whose space patches are projected, None without one.
    """

    def __init__(
        self,
        parts: ModelParts,
        modality: str,
        wanted: Collection[Need],
        merge: EncoderMerge | None = None,
        text_encoder: PromptEncoder | None = None,
    ) -> None:
        self.parts, self.modality, self.merge = parts, modality, merge
        self.wanted, self._text_encoder = list(wanted), text_encoder
        self._values: dict[Need, list[Tensor]] = {need: [] for need in self.wanted}
        self._real: dict[int, Tensor | None] = {}

    @marked("signal")
    def read_attention(self, block: int, call: AttentionCall) -> bool:
        """Read one attention call of a block; packed towers make one per segment."""
        for need in self._of(block):
            if isinstance(need, EncoderProjection):
                self._add(need, read_projection(need, call, self.parts))
            elif isinstance(need, EncoderAttention) and not is_of_states(need):
                self._add(need, read_attention(need, call, self.parts))
            elif isinstance(need, EncoderAttention):
                self._real[block] = real_keys(call)
        return False

    @marked("signal")
    @torch.no_grad()
    def read_states(self, block: int, states: Tensor) -> None:
        """Read what a block gave: (tiles, N, D), or (sum, D) of a packed tower."""
        packed = states.ndim != 3
        states = states[None] if packed else states
        for need in self._of(block):
            if isinstance(need, EncoderStates):
                self._add(need, read_states(need, states, self.parts))
            elif isinstance(need, EncoderAttention) and is_of_states(need):
                self._add(need, self._of_probe(need, states, self._real.pop(block, None)))
            elif isinstance(need, Embedding) and self._text_encoder is not None:
                self._values[need].append(self._in_shared_space(need, states, packed, self._text_encoder))

    def _of_probe(self, need: EncoderAttention, states: Tensor, real: Tensor | None) -> Tensor:
        """Return what the query of the pooling head looks at: the tower's, or else that of the text encoder."""
        if self.parts.probe_head is not None:
            assert self.parts.tower is not None
            return read_probe(need, states, real, self.parts.tower)
        lent = None if self._text_encoder is None else self._text_encoder.pooling_model
        assert lent is not None
        device, dtype = place_of(lent)
        return read_probe(need, states.to(device, dtype), real, lent)

    def _in_shared_space(self, need: Embedding, states: Tensor, packed: bool, encoder: PromptEncoder) -> Tensor:
        """Return the vectors (tiles, N, D) of patches, or of their whole pictures, the same for all of a tile."""
        patches = self.parts.patches(states)
        if not need.pooled:
            return encoder.project(patches, need.raw)
        if packed:
            raise UnsupportedModelError(
                f"The vision encoder of '{self.parts.row.model_type}' packs the patches of all frames into one row, so "
                "that no vector of a frame can be had. Use a method that compares no whole frames with the words."
            )
        whole = encoder.project(states[:, :1])[:, 0] if self.parts.has_cls else encoder.pooled(patches)
        return whole[:, None].expand(-1, patches.shape[1], -1)

    @marked("signal")
    @torch.no_grad()
    def push_projector(self, projector: nn.Module, states: Tensor) -> None:
        """Read how a projector answers to pushes; states: what it gets, (tiles, N, C), or (sum, C) if packed."""
        for need in self.wanted:
            if isinstance(need, Sensitivity):
                self._values[need].append(read_sensitivity(need, projector, states, self.parts))

    @property
    def _is_seen(self) -> bool:
        """True where no row says how encoder tokens become the LLM's."""
        return self.parts.row.tower_to_llm == "none"

    def _of(self, block: int) -> list[Need]:
        return [need for need in self.wanted if block_of(need, self.parts) == block]

    def _add(self, need: Need, values: Tensor) -> None:
        self._values[need].append(self.parts.patches(values))

    @marked("signal")
    def features(self, inputs: Mapping[str, Any], output: Any, seen: SeenCarry) -> Features:
        """Return lengths, tiles and signals of the items that the feature method returned.

        seen: carries values where the way to the LLM's tokens has to be found by experiment.

        Raises:
            UnsupportedModelError: a signal that the method needs was not read.
        """
        lengths = item_lengths(output, self.parts.row.late)
        if lengths is None:
            return Features(self.modality, None)
        lengths = with_breaks(self.parts, self.modality, inputs, lengths)
        tiles = find_tiles(self.parts, self.modality, inputs, lengths)

        def carry(values: Tensor, fill: float) -> Sequence[Tensor]:
            if self._is_seen:
                return seen(self.modality, inputs, lengths, values, fill)
            return to_llm_tokens(self.parts, self.modality, inputs, lengths, values, fill)

        groups = None if self.merge is None else self.merge.groups(self.modality, inputs, lengths)
        return Features(self.modality, tuple(lengths), tuple(tiles), self.signals(carry), groups)

    def signals(self, carry: Carry) -> dict[Need, tuple[Tensor, ...]]:
        """Return what was read, (length, ...) of each item.

        Raises:
            UnsupportedModelError: a signal was not read.
        """
        return {need: self._carried(need, carry) for need in self.wanted}

    def _carried(self, need: Need, carry: Carry) -> tuple[Tensor, ...]:
        read = self._values[need]
        if not read:
            raise UnsupportedModelError(
                f"The vision encoder of '{self.parts.row.model_type}' ran without calling the attention that gives "
                f"{need}. Use a method that reads nothing of the vision encoder."
            )
        packed = self.parts.row.tower == "packed" or self._is_seen
        values = torch.cat([value.flatten(0, 1) for value in read]) if packed else torch.cat(read)
        # Tokens come behind the tiles, if there are any; what follows belongs to one token.
        shape = values.shape[1 if packed else 2 :]
        flat = values.flatten(1 if packed else 2) if shape else values.unsqueeze(-1)
        fill = float("-inf") if isinstance(need, (EncoderAttention, Sensitivity)) else 0.0
        return tuple(item.reshape(len(item), *shape) for item in carry(flat.float(), fill))


def item_lengths(output: Any, late: bool = False) -> list[int] | None:
    """Return the tokens of each item of a feature method's output, None where the output does not tell.

    late: its features are projected behind the method.
    """
    features = projected(output, late)
    if isinstance(features, Tensor):
        return [features.shape[1]] * features.shape[0]
    return None if features is None else [item.numel() // item.shape[-1] for item in features]
