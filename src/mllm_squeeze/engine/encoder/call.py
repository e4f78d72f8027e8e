"""One call of a family's feature method: what the encoder's taps read in it, carried to the tokens it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.engine.encoder.merging import EncoderMerge
from mllm_squeeze.engine.signals.rows import AttentionCall, score_received, score_rows
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.grids import find_tiles, with_breaks
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.family.tower_to_llm import to_llm_tokens
from mllm_squeeze.reducers.needs import EncoderAttention, Need
from mllm_squeeze.upstream.outputs import projected


class EncodeCall:
    """Collects encoder signals while a feature method runs.

    wanted: the signals that the plan's reducers read. merge: the reduction that
    runs inside the encoder, None without one.
    """

    def __init__(
        self, parts: ModelParts, modality: str, wanted: frozenset[Need], merge: EncoderMerge | None = None
    ) -> None:
        self.parts, self.modality, self.wanted, self.merge = parts, modality, wanted, merge
        self._values: dict[Need, list[Tensor]] = {need: [] for need in wanted}

    @marked("signal")
    def read(self, call: AttentionCall) -> bool:
        """Read one attention call of the feature layer; packed towers make one per segment."""
        special = self.parts.special_tokens
        for need, values in self._values.items():
            read = self._received(call) if isinstance(need, EncoderAttention) else call.key.float().mean(1)
            values.append(read[:, special:])
        return False

    def _received(self, call: AttentionCall) -> Tensor:
        batch, heads, _, _ = call.query.shape
        if not self.parts.special_tokens:
            return score_received(call)
        first = torch.zeros(batch, 1, dtype=torch.long, device=call.query.device)
        weights = torch.full_like(first, heads, dtype=torch.float32)
        return score_rows(call, first, weights, causal=False)

    @marked("signal")
    def features(self, inputs: Mapping[str, Any], output: Any) -> Features:
        """Return lengths, tiles and signals of the items that the feature method returned.

        Raises:
            UnsupportedModelError: a signal that the method needs was not read.
        """
        lengths = item_lengths(output)
        if lengths is None:
            return Features(self.modality, None)
        lengths = with_breaks(self.parts, self.modality, inputs, lengths)
        tiles = find_tiles(self.parts, self.modality, inputs, lengths)
        signals = {need: self._carried(need, inputs, lengths) for need in self.wanted}
        groups = None if self.merge is None else self.merge.groups(self.modality, inputs, lengths)
        return Features(self.modality, tuple(lengths), tuple(tiles), signals, groups)

    def _carried(self, need: Need, inputs: Mapping[str, Any], lengths: list[int]) -> tuple[Tensor, ...]:
        read = self._values[need]
        if not read:
            raise UnsupportedModelError(
                f"The vision encoder of '{self.parts.row.model_type}' ran without calling the attention that gives "
                f"{need}. Use a method that reads nothing of the vision encoder."
            )
        packed = self.parts.row.tower == "packed"
        values = torch.cat([value.squeeze(0) for value in read]) if packed else torch.cat(read)
        flat = values.ndim == (1 if packed else 2)
        values = values.unsqueeze(-1) if flat else values
        fill = float("-inf") if isinstance(need, EncoderAttention) else 0.0
        carried = to_llm_tokens(self.parts, self.modality, inputs, lengths, values.float(), fill)
        return tuple(item.squeeze(-1) if flat else item for item in carried)


def item_lengths(output: Any) -> list[int] | None:
    """Return the tokens of each item of a feature method's output, None where the output does not tell."""
    features = projected(output)
    if isinstance(features, Tensor):
        return [features.shape[1]] * features.shape[0]
    return None if features is None else [item.numel() // item.shape[-1] for item in features]
