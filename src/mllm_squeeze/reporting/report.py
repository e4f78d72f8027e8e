"""What one prefill did: tokens per step and layer, FLOPs, cache size and the rule's own time, as text, dict or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mllm_squeeze.reporting.dims import ModelDims

SPANS_SHOWN = 8
STEPS_SHOWN = 12


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
    keys: where visual tokens are no part of the prompt, what was attended to instead; spans are then spans of keys.
    """

    method: str
    layout_length: int
    batch: int
    spans: tuple[SpanRecord, ...]
    stages: tuple[StageRecord, ...]
    layer_lengths: tuple[int, ...]
    dims: ModelDims | None = None
    decode: tuple[str, ...] = ()
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
        """FLOPs of the prefill with every token, see `ModelDims.layer_flops`."""
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
        return self.record.batch * dims.prefill_flops(lengths, keys, new)

    def _cache_bytes(self, entries: Sequence[int], dense: bool = False) -> int | None:
        dims = self.record.dims
        if dims is None:
            return None
        entries = self._crossed(entries, dense, held=True)
        return self.record.batch * dims.cache_bytes(entries, self.record.element_bytes)

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
        parts = [self._headline(), self._span_table(), self._step_table(), self._cost_table(), self._layers()]
        parts += list(self.record.decode)
        return "\n".join(part for part in parts if part)

    def _headline(self) -> str:
        size = f"batch of {self.record.batch}, prompt of {self.record.layout_length}"
        if self.record.past:
            size += f" after {self.record.past} seen before"
        if self.record.keys is not None and not self.record.keys.layers:
            size = f"batch of {self.record.batch}, in front of the Q-Former"
        if not self.record.spans:
            return f"{self.method}: no visual tokens in the last prefill ({size})"
        counts = f"{self.visual_before} -> {self.visual_after} visual tokens, {100 * self.ratio:.1f} % removed"
        return f"{self.method}: {counts} ({size})"

    def _span_table(self) -> str:
        spans = self.record.spans
        if not spans:
            return ""
        rows = [["span", "sample", "kind", "tokens", "asked"]]
        for i, span in enumerate(spans[:SPANS_SHOWN]):
            kept = _chain([step[i] for step in self.span_tokens])
            asked = _chain([None if stage.asked is None else stage.asked[i] for stage in self.record.stages])
            rows.append([str(i), str(span.sample), span.modality, kept, asked])
        table = _table(rows, left=(2, 3, 4))
        hidden = len(spans) - SPANS_SHOWN
        return f"\n{table}" + (f"\n  ... and {hidden} more" if hidden > 0 else "")

    def _step_table(self) -> str:
        stages = self.record.stages
        if not stages:
            return ""
        columns = "sequence" if self.record.keys is None else "keys"
        rows = [["step", "rule", "where", "asked", "visual", columns, "rule's time"]]
        for i, stage in enumerate(stages[:STEPS_SHOWN]):
            visual = f"{sum(stage.before)} -> {sum(stage.after)}"
            sequence = f"{stage.sequence_before} -> {stage.sequence_after}"
            asked = "-" if stage.asked is None else str(sum(stage.asked))
            rows.append([str(i), stage.reducer, _where(stage), asked, visual, sequence, _time(stage.seconds)])
        table = _table(rows, left=(1, 2))
        hidden = len(stages) - STEPS_SHOWN
        return f"\n{table}" + (f"\n  ... and {hidden} more" if hidden > 0 else "")

    def _cost_table(self) -> str:
        dense, keys = float(self.record.layout_length), self.record.keys
        if keys is not None and not keys.layers:
            return ""
        length = ["tokens per layer (mean)", f"{dense:.1f}", f"{self.mean_tokens:.1f}", _share(self.mean_tokens, dense)]
        if keys is not None:
            before, after = keys.held_before + keys.before, keys.held_after + keys.after
            length = ["keys per cross-attention layer", f"{before}", f"{after}", _share(after, before)]
        rows = [
            ["language model, prefill", "dense", "now", "of dense"],
            length,
            ["FLOPs", _unit(self.flops_dense, 1000), _unit(self.flops, 1000), _share(self.flops, self.flops_dense)],
            [
                "KV cache",
                _unit(self.cache_bytes_dense, 1024),
                _unit(self.cache_bytes, 1024),
                _share(self.cache_bytes, self.cache_bytes_dense),
            ],
            ["the rule's own time", "", _time(self.seconds), ""],
        ]
        return f"\n{_table(rows, left=(0,))}"

    def _layers(self) -> str:
        """Layers that ran on the same number of tokens, as ranges."""
        lengths = self.record.layer_lengths
        if not lengths:
            return ""
        starts = [i for i, n in enumerate(lengths) if i == 0 or n != lengths[i - 1]]
        ends = [*[i - 1 for i in starts[1:]], len(lengths) - 1]
        ranges = [
            f"{start}: {lengths[start]}" if start == end else f"{start}-{end}: {lengths[start]}"
            for start, end in zip(starts, ends, strict=True)
        ]
        crossed = "" if self.record.keys is None else f"   (keys in {', '.join(map(str, self.record.keys.layers))})"
        return f"\ntokens in decoder layers  {'   '.join(ranges)}{crossed}"


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _chain(counts: Sequence[int | None]) -> str:
    """Counts joined by arrows, the middle of a long chain left out; None is one that nobody asked for."""
    words = ["-" if count is None else str(count) for count in counts]
    if len(words) > 6:
        words = [*words[:3], "...", *words[-2:]]
    return " -> ".join(words)


def _where(stage: StageRecord) -> str:
    return f"layer {stage.layer}" if stage.place == "layer" else stage.place


def _time(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{1000 * seconds:.2f} ms"


def _share(now: float | None, dense: float | None) -> str:
    return f"{100 * now / dense:.1f} %" if now is not None and dense else "-"


def _unit(value: int | None, base: int) -> str:
    """A count in powers of 1000, or bytes in powers of 1024, with three digits or so."""
    if value is None:
        return "unknown"
    units = ("", "K", "M", "G", "T", "P", "E") if base == 1000 else ("B", "KiB", "MiB", "GiB", "TiB")
    size, power = float(value), 0
    while size >= base and power < len(units) - 1:
        size, power = size / base, power + 1
    number = f"{size:.0f}" if power == 0 or size >= 100 else f"{size:.2f}"
    return f"{number} {units[power]}".strip()


def _table(rows: list[list[str]], left: tuple[int, ...]) -> str:
    """Rows as columns of text, two blanks apart; columns in `left` are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
