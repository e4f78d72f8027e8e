"""What a budget of one request costs: microseconds of a block, and milliseconds of a switch of the method.

python benchmarks/per_request.py --json benchmarks/results_requests/cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

import mllm_squeeze as squeeze
from mllm_squeeze import demo

SWITCHED = ("divprune", "visionzip", "pyramiddrop", "fastv")


def seconds(work: Callable[[], object]) -> float:
    """Return what one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def block(handle: Any, ratio: float) -> None:
    """Enter and leave a block."""
    with handle.using(ratio=ratio):
        pass


def measured() -> dict[str, float]:
    """Return the median of each cost on the model in the box."""
    model = AutoModelForImageTextToText.from_pretrained(demo.folder())
    handle = squeeze.apply(model, "fastv", ratio=0.5)
    first = [seconds(partial(block, handle, number / 201)) for number in range(200)]
    known = [seconds(partial(block, handle, 0.5)) for _ in range(5000)]
    found = {"first use of a budget, us": statistics.median(first) * 1e6}
    found["known budget, us"] = statistics.median(known) * 1e6
    for method in SWITCHED:
        found[f"switch to {method}, ms"] = 1e3 * seconds(partial(handle.switch, method, ratio=0.5))
    return found


def main() -> None:
    """Print the costs, and write them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    chosen = parser.parse_args()
    report: dict[str, Any] = {name: round(value, 1) for name, value in measured().items()}
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    if chosen.json:
        report |= {"device": "cpu", "cores": os.cpu_count()}
        report |= {name: metadata.version(name) for name in ("torch", "transformers", "mllm-squeeze")}
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
