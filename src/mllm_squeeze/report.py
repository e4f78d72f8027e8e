"""What one prefill did: tokens per step and layer, FLOPs, cache size and the rule's own time, as text, dict or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

SPANS_SHOWN = 8
STEPS_SHOWN = 12


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the language model.

    intermediate: what one token passes in the MLP (all active experts together). mlp_matrices: 3 in a gated MLP, 2 in a
    plain one.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3

    def layer_flops(self, tokens: int, keys: int | None = None) -> int:
        """FLOPs of one decoder layer on n tokens that see m keys (m = n if None), a multiply-add counting as two.

        2 n D (2 H d + 2 G d)   projections of query and output (H heads of size d), of key and value (G grouped heads)
        + 2 * 2 n m H d         scores and weighted sum, over the full square (a causal kernel may skip half of it)
        + 2 n M D I             MLP with M matrices (gate, up, down: M = 3) of hidden size D times I
        """
        width, grouped = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 2 * tokens * self.hidden * (2 * width + 2 * grouped)
        attention = 2 * 2 * tokens * (tokens if keys is None else keys) * width
        return projections + attention + 2 * tokens * self.mlp_matrices * self.hidden * self.intermediate

    def prefill_flops(self, lengths: Sequence[int], keys: Sequence[int] | None = None) -> int:
        """FLOPs of one prompt whose layers run on `lengths` tokens and see `keys`, plus one row of logits (2 D V)."""
        return sum(map(self.layer_flops, lengths, lengths if keys is None else keys)) + 2 * self.hidden * self.vocab

    def cache_bytes(self, entries: Sequence[int], element_bytes: int) -> int:
        """Bytes of the keys and values of one prompt whose layers hold `entries` each: the sum of 2 n G d b."""
        return sum(entries) * 2 * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class SpanRecord:
    """One image or video of the prompt, with the visual tokens it had before any step."""

    sample: int
    modality: str
    length: int


@dataclass(frozen=True)
class StageRecord:
    """One step of the method.

    layer: first decoder layer that ran short. place: "encoder", "projector", "layer" or "cache". before, after: tokens
    of each span, in tokens of the language model also for a step in the encoder. sequence_before, sequence_after:
    columns of the padded batch. seconds: time the rule took, None where it was not measured.
    """

    layer: int
    place: str
    reducer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    sequence_before: int
    sequence_after: int
    seconds: float | None = None


@dataclass(frozen=True)
class PrefillRecord:
    """What the engine writes down about one prefill.

    layout_length: columns of the padded prompt. layer_lengths: columns on which each decoder layer ran. cache_lengths:
    entries that each layer holds after the prefill, the same as layer_lengths if None. element_bytes: bytes of one
    number in the cache. past: tokens of earlier turns that the dense model would hold. decode: remarks about decoding.
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


@dataclass(frozen=True)
class Report:
    """What the last prefill did; printing it gives a table, `as_dict()` and `to_json()` the numbers.

    FLOPs and bytes are those of the whole batch in the language model, padding included, as the hardware runs it; the
    vision encoder is not in them. They are None where the sizes of the language model are not known.
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
        """Visual tokens of the batch on which each decoder layer ran."""
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
        layers = len(self.record.layer_lengths)
        return self._flops(
            (self.record.layout_length,) * layers, (self.record.layout_length + self.record.past,) * layers
        )

    @property
    def flops(self) -> int | None:
        """FLOPs of the prefill as it ran."""
        record = self.record
        # Without earlier turns a layer sees what it runs on; the cache may be cut shorter than that afterwards.
        keys = record.cache_lengths if record.past and record.cache_lengths else record.layer_lengths
        return self._flops(record.layer_lengths, keys)

    @property
    def cache_bytes_dense(self) -> int | None:
        """Bytes of the KV cache after a prefill with every token."""
        return self._cache_bytes((self.record.layout_length + self.record.past,) * len(self.record.layer_lengths))

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the KV cache after this prefill."""
        held = self.record.cache_lengths
        return self._cache_bytes(self.record.layer_lengths if held is None else held)

    @property
    def seconds(self) -> float | None:
        """Time that the rules of all steps took, None where one of them was not measured."""
        times = [stage.seconds for stage in self.record.stages]
        return None if None in times else float(sum(t for t in times if t is not None))

    def _flops(self, lengths: Sequence[int], keys: Sequence[int]) -> int | None:
        dims = self.record.dims
        return None if dims is None else self.record.batch * dims.prefill_flops(lengths, keys)

    def _cache_bytes(self, entries: Sequence[int]) -> int | None:
        dims = self.record.dims
        return None if dims is None else self.record.batch * dims.cache_bytes(entries, self.record.element_bytes)

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
        if not self.record.spans:
            return f"{self.method}: no visual tokens in the last prefill ({size})"
        counts = f"{self.visual_before} -> {self.visual_after} visual tokens, {100 * self.ratio:.1f} % removed"
        return f"{self.method}: {counts} ({size})"

    def _span_table(self) -> str:
        spans = self.record.spans
        if not spans:
            return ""
        rows = [["span", "sample", "kind", "tokens"]]
        for i, span in enumerate(spans[:SPANS_SHOWN]):
            rows.append([str(i), str(span.sample), span.modality, _chain([step[i] for step in self.span_tokens])])
        table = _table(rows, left=(2, 3))
        hidden = len(spans) - SPANS_SHOWN
        return f"\n{table}" + (f"\n  ... and {hidden} more" if hidden > 0 else "")

    def _step_table(self) -> str:
        stages = self.record.stages
        if not stages:
            return ""
        rows = [["step", "rule", "where", "visual", "sequence", "rule's time"]]
        for i, stage in enumerate(stages[:STEPS_SHOWN]):
            visual = f"{sum(stage.before)} -> {sum(stage.after)}"
            sequence = f"{stage.sequence_before} -> {stage.sequence_after}"
            rows.append([str(i), stage.reducer, _where(stage), visual, sequence, _time(stage.seconds)])
        table = _table(rows, left=(1, 2))
        hidden = len(stages) - STEPS_SHOWN
        return f"\n{table}" + (f"\n  ... and {hidden} more" if hidden > 0 else "")

    def _cost_table(self) -> str:
        dense = float(self.record.layout_length)
        rows = [
            ["language model, prefill", "dense", "now", "of dense"],
            ["tokens per layer (mean)", f"{dense:.1f}", f"{self.mean_tokens:.1f}", _share(self.mean_tokens, dense)],
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
        return f"\ntokens in decoder layers  {'   '.join(ranges)}"


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _chain(counts: Sequence[int]) -> str:
    """Counts joined by arrows, the middle of a long chain left out."""
    words = [str(count) for count in counts]
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
