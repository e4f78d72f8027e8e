"""What one prefill did: tokens per step and layer, FLOPs, cache size and the rule's own time, as text, dict or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mllm_squeeze.reporting import flops

if TYPE_CHECKING:
    from mllm_squeeze.upstream.configs import TextSizes


@dataclass(frozen=True)
class SpanRecord:
    """One image or video of the prompt, with the visual tokens it had before any step."""

    sample: int
    modality: str
    length: int


@dataclass(frozen=True)
class KeyRecord:
    """Keys that are attended to from outside, by the text in cross-attention layers or by the queries of a Q-Former.

    layers: decoder layers that attend to them, () for a Q-Former. before, after: keys of one row in this prefill,
    padding included. held_before, held_after: those of earlier turns.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    held_before: int = 0
    held_after: int = 0


@dataclass(frozen=True)
class StageRecord:
    """One step of the method.

    layer: first decoder layer that ran short. place: "encoder", "keys", "projector", "layer" or "cache". before,
    after: tokens of each span, in tokens of the language model also for a step in the encoder. sequence_before,
    sequence_after: columns of the padded batch, or of its keys. seconds: time the rule took, None where it was not
    measured. asked: tokens each span was asked to keep, None where the rule decided.
    """

    layer: int
    place: str
    reducer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    sequence_before: int
    sequence_after: int
    seconds: float | None = None
    asked: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PrefillRecord:
    """What the engine writes down about one prefill.

    layout_length: columns of the padded prompt. layer_lengths: columns on which each decoder layer ran. cache_lengths:
    entries that each layer holds after the prefill, the same as layer_lengths if None. element_bytes: bytes of one
    number in the cache. past: tokens of earlier turns that the dense model would hold. decode: remarks about decoding.
    signals: remarks about what a rule read, such as what stood in for something else.
    idle: remarks about steps that had nothing to do.
    keys: where visual tokens are no part of the prompt, what was attended to instead; spans are then spans of keys.
    """

    method: str
    layout_length: int
    batch: int
    spans: tuple[SpanRecord, ...]
    stages: tuple[StageRecord, ...]
    layer_lengths: tuple[int, ...]
    dims: TextSizes | None = None
    decode: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    element_bytes: int = 2
    cache_lengths: tuple[int, ...] | None = None
    past: int = 0
    keys: KeyRecord | None = None


@dataclass(frozen=True)
class Report:
    """What the last prefill did; printing it gives a table, `as_dict()` and `to_json()` the numbers.

    FLOPs and bytes are those of the whole batch in the language model, padding included, as the hardware runs it; the
    vision encoder is not in them. They are None where the sizes of the language model are not known, and where a method
    acts in front of a Q-Former, which leaves the language model as it is.
    """

    record: PrefillRecord

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.record.method

    @property
    def visual_before(self) -> int:
        """Visual tokens of the batch before any step."""
        return sum(span.length for span in self.record.spans)

    @property
    def visual_after(self) -> int:
        """Visual tokens of the batch that are left when all steps have run."""
        return sum(self.span_tokens[-1])

    @property
    def ratio(self) -> float:
        """Fraction of the visual tokens removed in the end, 0 where there are none."""
        return 1 - self.visual_after / self.visual_before if self.visual_before else 0.0

    @cached_property
    def span_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each span, (steps + 1, spans): first before any step, then after each."""
        start = tuple(span.length for span in self.record.spans)
        return (start, *(stage.after for stage in self.record.stages))

    @cached_property
    def visual_per_layer(self) -> tuple[int, ...]:
        """Visual tokens of the batch on which each decoder layer ran, or to whose keys it attended."""
        if self.record.keys is not None:
            crossed, layers = self.record.keys.layers, range(len(self.record.layer_lengths))
            return tuple(self.visual_after if layer in crossed else 0 for layer in layers)
        cuts = [stage for stage in self.record.stages if stage.place != "cache"]
        out = []
        for layer in range(len(self.record.layer_lengths)):
            reached = [sum(stage.after) for stage in cuts if stage.layer <= layer]
            out.append(reached[-1] if reached else self.visual_before)
        return tuple(out)

    @property
    def mean_tokens(self) -> float:
        """Columns per decoder layer, mean over the layers."""
        return _mean(self.record.layer_lengths)

    @property
    def mean_visual(self) -> float:
        """Visual tokens of the batch per decoder layer, mean over the layers: the average token number of papers."""
        return _mean(self.visual_per_layer)

    @property
    def flops_dense(self) -> int | None:
        """FLOPs of the prefill with every token, see `reporting.flops.layer_flops`."""
        length, layers = self.record.layout_length, len(self.record.layer_lengths)
        return self._flops((length,) * layers, (length + self.record.past,) * layers, dense=True)

    @property
    def flops(self) -> int | None:
        """FLOPs of the prefill as it ran."""
        record = self.record
        # Without earlier turns a layer sees what it runs on; the cache may be cut shorter than that afterwards.
        keys = record.cache_lengths if record.past and record.cache_lengths else record.layer_lengths
        if record.keys is not None:
            return self._flops(record.layer_lengths, [n + record.past for n in record.layer_lengths])
        return self._flops(record.layer_lengths, keys)

    @property
    def cache_bytes_dense(self) -> int | None:
        """Bytes of the KV cache after a prefill with every token."""
        length = self.record.layout_length + self.record.past
        return self._cache_bytes((length,) * len(self.record.layer_lengths), dense=True)

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the KV cache after this prefill."""
        record, held = self.record, self.record.cache_lengths
        if record.keys is not None:
            return self._cache_bytes([n + record.past for n in record.layer_lengths])
        return self._cache_bytes(record.layer_lengths if held is None else held)

    @property
    def seconds(self) -> float | None:
        """Time that the rules of all steps took, None where one of them was not measured."""
        times = [stage.seconds for stage in self.record.stages]
        return None if None in times else float(sum(t for t in times if t is not None))

    def _flops(self, lengths: Sequence[int], keys: Sequence[int], dense: bool = False) -> int | None:
        dims = self.record.dims
        if dims is None:
            return None
        keys, new = self._crossed(keys, dense, held=True), self._crossed(lengths, dense, held=False)
        return self.record.batch * flops.prefill_flops(dims, lengths, keys, new)

    def _cache_bytes(self, entries: Sequence[int], dense: bool = False) -> int | None:
        dims = self.record.dims
        if dims is None:
            return None
        entries = self._crossed(entries, dense, held=True)
        return self.record.batch * flops.cache_bytes(dims, entries, self.record.element_bytes)

    def _crossed(self, counts: Sequence[int], dense: bool, held: bool) -> list[int]:
        """Return counts per layer, with those of the pictures' keys in layers that attend to them."""
        out, keys = list(counts), self.record.keys
        for layer in keys.layers if keys is not None else ():
            assert keys is not None
            out[layer] = keys.before if dense else keys.after
            out[layer] += (keys.held_before if dense else keys.held_after) if held else 0
        return out

    def as_dict(self) -> dict[str, Any]:
        """Return the record and all numbers derived from it, in plain types."""
        return {
            **asdict(self.record),
            "visual_before": self.visual_before,
            "visual_after": self.visual_after,
            "ratio": self.ratio,
            "span_tokens": self.span_tokens,
            "visual_per_layer": self.visual_per_layer,
            "mean_tokens": self.mean_tokens,
            "mean_visual": self.mean_visual,
            "flops_dense": self.flops_dense,
            "flops": self.flops,
            "cache_bytes_dense": self.cache_bytes_dense,
            "cache_bytes": self.cache_bytes,
            "seconds": self.seconds,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return `as_dict()` as JSON."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        from mllm_squeeze.reporting.text import text

        return text(self)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
