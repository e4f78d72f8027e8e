"""What a budget of one request costs: microseconds of a block, and milliseconds of a switch of the method."""

from __future__ import annotations

import time

from transformers import AutoModelForImageTextToText

import mllm_squeeze as squeeze
from mllm_squeeze import demo


def main() -> None:
    """Print what each costs on the model in the box."""
    model = AutoModelForImageTextToText.from_pretrained(demo.folder())
    handle = squeeze.apply(model, "fastv", ratio=0.5)
    start = time.perf_counter()
    for number in range(200):
        with handle.using(ratio=number / 201):
            pass
    print(f"a budget for the first time: {(time.perf_counter() - start) / 200 * 1e6:.0f} us")
    start = time.perf_counter()
    for _ in range(20000):
        with handle.using(ratio=0.9):
            pass
    print(f"a budget that is known: {(time.perf_counter() - start) / 20000 * 1e6:.1f} us")
    for method in ("divprune", "visionzip", "pyramiddrop", "fastv"):
        start = time.perf_counter()
        handle.switch(method, ratio=0.5)
        print(f"switch to {method}: {(time.perf_counter() - start) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
