"""One prefill under the profiler: a trace for a viewer, and where the rule's own time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

from mllm_squeeze.bench.contestants import Contestant

_PREFIX = "squeeze::"


@torch.inference_mode()
def trace(one: Contestant, path: Path) -> Any:
    """Profile encoder and prefill of a contestant, write a Chrome trace to `path`, and return the profiler."""
    activities = [ProfilerActivity.CPU]
    if one.model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with one.active():
        one.prefill()
        with profile(activities=activities) as found:
            one.encode()
            one.prefill()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    return found


def busiest(profiler: Any, part: str, count: int = 6) -> list[tuple[str, float, int]]:
    """Return (operation, milliseconds of its own on the CPU, calls) of the busiest operations inside one part."""
    total: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        if event.name != f"{_PREFIX}{part}":
            continue
        waiting = list(event.cpu_children)
        while waiting:
            child = waiting.pop()
            waiting += child.cpu_children
            time, calls = total.get(child.name, (0.0, 0))
            total[child.name] = (time + child.self_cpu_time_total / 1000, calls + 1)
    ordered = sorted(((name, *found) for name, found in total.items()), key=lambda row: -row[1])
    return ordered[:count]


def table(profiler: Any, parts: tuple[str, ...]) -> Table:
    """Return the parts of the rule with their time on the CPU and on the device, and their busiest operations."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("part", "calls", "cpu ms", "device ms", "busiest operations (own cpu ms x calls)"):
        found.add_column(header, justify="right" if header.endswith(("ms", "calls")) else "left")
    averages = {row.key: row for row in profiler.key_averages()}
    for part in parts:
        row = averages.get(f"{_PREFIX}{part}")
        if row is None:
            continue
        busy = ", ".join(f"{name} {ms:.2f} x {calls}" for name, ms, calls in busiest(profiler, part))
        device = f"{row.device_time_total / 1000:.2f}"
        found.add_row(Text(part, style="bold"), str(row.count), f"{row.cpu_time_total / 1000:.2f}", device, busy)
    return found
