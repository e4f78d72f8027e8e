"""What a benchmark found: plain numbers as JSON, and as a table for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table
from rich.text import Text

from mllm_squeeze.bench.measure import Spread, Times, paired, spread
from mllm_squeeze.reporting.tables import markdown as table_lines

Kind = Literal["dense", "ours", "oracle", "naive"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One contestant; times are in seconds, with one number per round in `rounds`.

    layers: tokens on which each decoder layer runs. rule: seconds of the rule's own work in encoder and prefill, by
    part. rule_share: their sum by the dense prefill. speedup, decode_speedup: dense by this. efficiency,
    decode_efficiency: oracle by this. memory: peak bytes of a prefill, beyond weights and features.
    """

    name: str
    kind: Kind
    method: str | None
    params: dict[str, Any]
    layers: tuple[int, ...]
    encoder: Spread
    prefill: Spread
    decode: Spread
    rule: dict[str, float]
    rule_share: float | None
    speedup: Spread
    decode_speedup: Spread
    efficiency: Spread | None
    decode_efficiency: Spread | None
    memory: int | None
    rounds: dict[str, list[float]]


class Results(_Strict):
    """One benchmark: what was run, on what, and one row per contestant.

    setting: model, visual tokens, prompt length, batch, dtype, attention, cache, clock, threads, rounds, steps.
    """

    version: Literal[1] = 1
    command: str
    environment: dict[str, Any]
    setting: dict[str, Any]
    rows: tuple[Row, ...]

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.json and `name`.md and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        paths[0].write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(markdown(self), encoding="utf-8")
        return paths

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a JSON file; raises pydantic.ValidationError where it is none of ours."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def make_row(
    name: str,
    kind: Kind,
    times: Times,
    dense: Times,
    oracle: Times | None,
    layers: Sequence[int],
    method: str | None = None,
    params: dict[str, Any] | None = None,
) -> Row:
    """Return the row of one contestant from its times, those of the dense model and those of its oracle."""
    rule = {part: spread(values).median for part, values in times.parts.items()}
    return Row(
        name=name,
        kind=kind,
        method=method,
        params=params or {},
        layers=tuple(layers),
        encoder=spread(times.encoder),
        prefill=spread(times.prefill),
        decode=spread(times.decode),
        rule=rule,
        rule_share=paired(times.rule, dense.prefill).median if kind == "ours" else None,
        speedup=paired(dense.prefill, times.prefill),
        decode_speedup=paired(dense.decode, times.decode),
        efficiency=None if oracle is None else paired(oracle.prefill, times.prefill),
        decode_efficiency=None if oracle is None else paired(oracle.decode, times.decode),
        memory=times.memory,
        rounds={"encoder": times.encoder, "prefill": times.prefill, "decode": times.decode},
    )


HEADERS = (
    "contestant",
    "tokens per layer",
    "prefill ms",
    "speed-up",
    "efficiency",
    "rule ms",
    "rule / dense",
    "decode ms",
    "speed-up",
    "efficiency",
    "encoder ms",
    "memory MiB",
)


def cells(row: Row, spreads: bool = True) -> list[str]:
    """Return a row as text, under HEADERS; spreads: show the quartiles of times."""
    return [
        row.name,
        f"{sum(row.layers) / len(row.layers):.0f}" if row.layers else "-",
        _time(row.prefill, 0, spreads),
        f"{row.speedup.median:.2f}",
        _ratio(row.efficiency),
        f"{1000 * sum(row.rule.values()):.1f}" if row.kind == "ours" else "-",
        "-" if row.rule_share is None else f"{100 * row.rule_share:.2f} %",
        _time(row.decode, 1, spreads),
        f"{row.decode_speedup.median:.2f}",
        _ratio(row.decode_efficiency),
        _time(row.encoder, 0, spreads),
        "-" if row.memory is None else f"{row.memory / 2**20:.1f}",
    ]


def _ratio(value: Spread | None) -> str:
    return "-" if value is None else f"{value.median:.3f}"


def _time(value: Spread, digits: int, spreads: bool) -> str:
    low, middle, high = (f"{1000 * v:.{digits}f}" for v in (value.low, value.median, value.high))
    return f"{middle} ({low}-{high})" if spreads and value.count > 1 else middle


# The columns of each table, behind the contestant: side by side they are wider than most terminals, and than a pipe.
_GROUPS = (("prefill", range(1, 7)), ("decoding, encoder, memory", range(7, len(HEADERS))))


def tables(results: Results) -> list[Table]:
    """Return the rows as tables for a terminal or a pipe, each of at most 80 columns."""
    return [*(_group(results, name, columns) for name, columns in _GROUPS), _parts_table(results)]


def _group(results: Results, name: str, columns: Sequence[int]) -> Table:
    found = _table(name, [HEADERS[n] for n in columns])
    for row in results.rows:
        style = "bold" if row.kind == "ours" else "dim" if row.kind in ("oracle", "naive") else ""
        texts = cells(row, spreads=False)
        found.add_row(Text(row.name, style=style), *(Text(texts[n], style=style) for n in columns))
    return found


def _parts_table(results: Results) -> Table:
    names = list(results.rows[0].rule)
    found = _table("the rule's own work, ms", [*names, "sum"])
    for row in results.rows:
        if row.kind == "ours":
            values = [*row.rule.values(), sum(row.rule.values())]
            found.add_row(Text(row.name, style="bold"), *(Text(f"{1000 * value:.2f}") for value in values))
    return found


def _table(title: str, headers: Sequence[str]) -> Table:
    """Return an empty table in which only names are folded where it gets narrow; long headers stand on two lines."""
    found = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        title=f"\n{title}",
        title_justify="left",
    )
    found.add_column(HEADERS[0], overflow="fold")
    for header in headers:
        first, _, rest = header.rpartition(" ")
        found.add_column(f"{first}\n{rest}" if first else rest, justify="right", no_wrap=True)
    return found


def title(results: Results) -> str:
    """Return one line that says what was run."""
    s = results.setting
    return (
        f"{s['model']}: {s['visual_tokens']} visual of {s['prompt_tokens']} tokens, batch {s['batch']}, {s['dtype']}, "
        f"{s['attention']}, {s['cache']} cache, {s['rounds']} rounds, {s['clock']} clock"
    )


def markdown(results: Results) -> str:
    """Return the results as a Markdown file: the command, the machine, the table, the parts of the rule."""
    lines = [f"# {title(results)}", "", "```", results.command, "```", ""]
    facts = {**results.environment, **{k: v for k, v in results.setting.items() if k in ("threads", "decoded_tokens")}}
    lines += [", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None) + ".", ""]
    lines += [
        "Times are medians over the rounds (quartiles in brackets); speed-up (dense by this) and efficiency "
        "(oracle by this) are medians of the ratios within a round.",
        "",
    ]
    lines += table_lines(HEADERS, [cells(row) for row in results.rows])
    ours = [row for row in results.rows if row.kind == "ours"]
    if ours:
        parts = list(ours[0].rule)
        body = [[row.name, *(f"{1000 * row.rule[part]:.2f}" for part in parts)] for row in ours]
        lines += ["", "The rule's own work in milliseconds, by part:", ""]
        lines += table_lines(("contestant", *parts), body)
    return "\n".join(lines) + "\n"


def machine(device: Any) -> dict[str, Any]:
    """Return what matters of the machine and the versions; no names of hosts."""
    import os

    import torch
    import transformers

    from mllm_squeeze import __version__

    out = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mllm-squeeze": __version__,
    }
    if device.type == "cuda":
        out["cuda"] = torch.version.cuda
    return out


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
