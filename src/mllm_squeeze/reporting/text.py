"""A report as text: one line that sums up, then tables of spans, steps and costs, readable in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mllm_squeeze.reporting.report import Report, StageRecord
from mllm_squeeze.reporting.tables import plain, table

SPANS_SHOWN = 8
STEPS_SHOWN = 12


def text(report: Report) -> str:
    """Return what a report says, without colours."""
    parts = [_headline(report), _spans(report), _steps(report), _costs(report), _layers(report)]
    parts += [*report.record.idle, *report.record.signals, *report.record.decode]
    return "\n".join(part for part in parts if part)


def _headline(report: Report) -> str:
    record = report.record
    size = f"batch of {record.batch}, prompt of {record.layout_length}"
    if record.past:
        size += f" after {record.past} seen before"
    if record.keys is not None and not record.keys.layers:
        size = f"batch of {record.batch}, in front of the Q-Former"
    if not record.spans:
        return f"{report.method}: no visual tokens in the last prefill ({size})"
    counts = f"{report.visual_before} -> {report.visual_after} visual tokens, {100 * report.ratio:.1f} % removed"
    return f"{report.method}: {counts} ({size})"


def _spans(report: Report) -> str:
    spans = report.record.spans
    if not spans:
        return ""
    rows = [
        [
            str(number),
            str(span.sample),
            span.modality,
            _chain([step[number] for step in report.span_tokens]),
            _chain([None if stage.asked is None else stage.asked[number] for stage in report.record.stages]),
        ]
        for number, span in enumerate(spans[:SPANS_SHOWN])
    ]
    names = ["span", "sample", "kind", "tokens", "asked"]
    return _shown(table(names, rows, left=(2, 3, 4)), len(spans) - SPANS_SHOWN)


def _steps(report: Report) -> str:
    stages = report.record.stages
    if not stages:
        return ""
    rows = [
        [
            str(number),
            stage.reducer,
            _where(stage),
            "-" if stage.asked is None else str(sum(stage.asked)),
            f"{sum(stage.before)} -> {sum(stage.after)}",
            f"{stage.sequence_before} -> {stage.sequence_after}",
            _time(stage.seconds),
        ]
        for number, stage in enumerate(stages[:STEPS_SHOWN])
    ]
    columns = "sequence" if report.record.keys is None else "keys"
    names = ["step", "rule", "where", "asked", "visual", columns, "rule's time"]
    return _shown(table(names, rows, left=(1, 2)), len(stages) - STEPS_SHOWN)


def _shown(rows: Table, hidden: int) -> str:
    return f"\n{plain(rows)}" + (f"\n  ... and {hidden} more" if hidden > 0 else "")


def _costs(report: Report) -> str:
    dense, keys = float(report.record.layout_length), report.record.keys
    if keys is not None and not keys.layers:
        return ""
    length = ["tokens per layer (mean)", f"{dense:.1f}", f"{report.mean_tokens:.1f}", _share(report.mean_tokens, dense)]
    if keys is not None:
        before, after = keys.held_before + keys.before, keys.held_after + keys.after
        length = ["keys per cross-attention layer", f"{before}", f"{after}", _share(after, before)]
    rows = [
        length,
        [
            "FLOPs",
            _unit(report.flops_dense, 1000),
            _unit(report.flops, 1000),
            _share(report.flops, report.flops_dense),
        ],
        [
            "KV cache",
            _unit(report.cache_bytes_dense, 1024),
            _unit(report.cache_bytes, 1024),
            _share(report.cache_bytes, report.cache_bytes_dense),
        ],
        ["the rule's own time", "", _time(report.seconds), ""],
    ]
    return f"\n{plain(table(['language model, prefill', 'dense', 'now', 'of dense'], rows, left=(0,)))}"


def _layers(report: Report) -> str:
    """Layers that ran on the same number of tokens, as ranges."""
    lengths, keys = report.record.layer_lengths, report.record.keys
    if not lengths:
        return ""
    starts = [i for i, n in enumerate(lengths) if i == 0 or n != lengths[i - 1]]
    ends = [*[i - 1 for i in starts[1:]], len(lengths) - 1]
    ranges = [
        f"{start}: {lengths[start]}" if start == end else f"{start}-{end}: {lengths[start]}"
        for start, end in zip(starts, ends, strict=True)
    ]
    crossed = "" if keys is None else f"   (keys in {', '.join(map(str, keys.layers))})"
    return f"\ntokens in decoder layers  {'   '.join(ranges)}{crossed}"


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
