"""Times each Triton kernel against its torch op, the full attention map and one fused attention forward.

    python benchmarks/kernels.py --json kernels.json          # on a GPU
    python benchmarks/kernels.py --smoke                      # tiny shapes on a CPU: does it run and agree?

Contestants of a case run in turns, so a change of clock speed meets all of them; the median counts. Each case also says
how far the kernel is from the torch op.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze import ops

SWITCH = "MLLM_SQUEEZE_KERNELS"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder like that of a 7B model, and its visual tokens."""

    tokens: int
    kept: int
    heads: int = 28
    groups: int = 4
    head_dim: int = 128
    width: int = 3584


@dataclass(frozen=True)
class Case:
    """One op on one shape: its contestants by name ("kernel" and "torch" are compared), and their inputs in words."""

    name: str
    shapes: str
    contestants: dict[str, Call]


SIZES = (Shapes(2880, 288), Shapes(16384, 1638))
SMOKE = (Shapes(48, 6, heads=4, groups=2, head_dim=16, width=32),)


@contextmanager
def switched(value: str) -> Iterator[None]:
    """Set the kernels' switch for a while."""
    before = os.environ[SWITCH]
    os.environ[SWITCH] = value
    try:
        yield
    finally:
        os.environ[SWITCH] = before


def both(op: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Call]:
    """Return the op with its kernel and without."""

    def without() -> Any:
        with switched("0"):
            return op(*args, **kwargs)

    return {"kernel": lambda: op(*args, **kwargs), "torch": without}


def full_map(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Return attention received, (B, P), the way eager attention shows it: from the whole map, softmax in float32."""
    share = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(share, 1).transpose(2, 3) * query.shape[-1] ** -0.5
    if causal:
        rows, keys = logits.shape[-2:]
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(keys - rows + 1)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).sum((1, 2))


def attention_cases(size: Shapes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield column sums over all rows (decoder and encoder), and rows times keys."""
    scale = size.head_dim**-0.5
    query = torch.randn(1, size.heads, size.tokens, size.head_dim, device=device, dtype=dtype)
    key = torch.randn(1, size.groups, size.tokens, size.head_dim, device=device, dtype=dtype)
    # The eager map in the dtype and in float32, at once.
    fits = device == "cpu" or size.heads * size.tokens**2 * 8 < torch.cuda.mem_get_info()[0] * 0.6
    words = f"{size.heads}/{size.groups} heads of {size.head_dim}, {size.tokens} tokens"
    for causal in (True, False):
        band = ops.attention_band(size.tokens, size.tokens, like=query) if causal else None
        extra: dict[str, Call] = {
            "sdpa forward": lambda c=causal: functional.scaled_dot_product_attention(
                query, key, key, is_causal=c, enable_gqa=True
            )
        }
        if fits:
            extra["full map"] = lambda c=causal: full_map(query, key, c)
        calls = both(ops.attention_received, query, key, None, scale, band=band)
        yield Case("attention received" + (", causal" if causal else ""), words, calls | extra)
    edges = torch.arange(0, size.tokens + 1, size.tokens // 4, device=device)
    packed = ops.attention_band(size.tokens, size.tokens, causal=False, cu_seqlens=edges)
    calls = both(ops.attention_received, query, key, None, scale, band=packed)
    yield Case("attention received, 4 packed pictures", words, calls)
    for rows in (1, 32):
        few, weights = query[:, :, -rows:], torch.ones(1, rows, device=device) / rows
        band = ops.attention_band(rows, size.tokens, like=few)
        extra = {"full map": lambda: full_map(query, key, True)} if fits else {}
        calls = both(ops.attention_from_rows, few, key, weights, None, scale, band=band)
        yield Case(f"attention from {rows} row{'s' * (rows > 1)}", words, calls | extra)


def choice_cases(size: Shapes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield greedy selections and matching."""
    x = torch.randn(1, size.tokens, size.width, device=device, dtype=dtype)
    mask = torch.ones(1, size.tokens, dtype=torch.bool, device=device)
    k = torch.tensor([size.kept], device=device)
    words = f"{size.tokens} tokens of {size.width} to {size.kept}"
    yield Case("farthest point", words, both(ops.farthest_point, x, mask, k, size.kept))
    if size.kept <= 512:
        yield Case("dpp map", words, both(ops.dpp_map, x, mask, k, size.kept))
        yield Case("facility location", words, both(ops.facility_location, x, mask, k, size.kept))
    alike, there = ops.cosine(x[:, :8], x), torch.ones(1, 8, dtype=torch.bool, device=device)
    calls = both(ops.least_alike_in_turns, mask, [alike], [there], k)
    yield Case("pivots in turns", f"8 pivots, {size.tokens} tokens to {size.kept}", calls)
    keys = x[..., : size.head_dim].contiguous()
    words = f"{size.tokens} keys of {keys.shape[-1]}, {size.kept} merged"
    yield Case("bipartite match", words, both(ops.bipartite_match, keys, mask, k))
    slots = max(1, size.kept // 10)
    targets = torch.arange(size.tokens, device=device)[None] < slots
    words = f"{size.tokens} keys of {keys.shape[-1]}, {slots} targets"
    yield Case("nearest target", words, both(ops.nearest_target, keys, targets, mask, slots))


def row_cases(size: Shapes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield merging and gathering."""
    x = torch.randn(1, size.tokens, size.width, device=device, dtype=dtype)
    assign = torch.randint(0, size.kept, (1, size.tokens), device=device)
    assign[:, : size.kept] = torch.arange(size.kept, device=device)
    words = f"{size.tokens} tokens of {size.width} into {size.kept}"
    yield Case("merge tokens", words, both(ops.merge_tokens, x, assign, ops.mean_weights(assign)))
    cos, sin = torch.randn(2, 1, size.tokens, size.head_dim, device=device, dtype=dtype)
    places = torch.arange(size.tokens, device=device)[None]
    index = torch.randperm(size.tokens, device=device)[None, : size.kept].sort().values
    words = f"{size.kept} of {size.tokens} rows: {size.width}, 2 x {size.head_dim}, 1"
    yield Case("gather together", words, both(ops.gather_together, index, (x, cos, sin, places)))


def seconds(call: Call, device: str) -> float:
    """Return how long a call takes, the work on the device included."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def peak(call: Call, device: str) -> int | None:
    """Return the bytes that a call holds at most beyond what is held already; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def difference(got: Any, wanted: Any) -> float:
    """Return the largest difference relative to the largest number; for choices, the share that differs."""
    if isinstance(got, tuple):
        return max(difference(a, b) for a, b in zip(got, wanted, strict=True))
    if not got.is_floating_point():
        return float((got != wanted).float().mean())
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-30))


def measure(case: Case, device: str, runs: int, warmup: int) -> dict[str, Any]:
    """Return the medians, fastest runs and memory of a case's contestants, run in turns."""
    apart = difference(case.contestants["kernel"](), case.contestants["torch"]())
    memory = {name: peak(call, device) for name, call in case.contestants.items()}
    for _ in range(warmup):
        for call in case.contestants.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in case.contestants}
    for _ in range(runs):
        for name, call in case.contestants.items():
            times[name].append(seconds(call, device))
    results = {
        name: {"median_ms": statistics.median(t) * 1e3, "fastest_ms": min(t) * 1e3, "peak_bytes": memory[name]}
        for name, t in times.items()
    }
    return {"case": case.name, "shapes": case.shapes, "difference": apart, "contestants": results}


def environment(device: str) -> dict[str, str]:
    """Return the device and the versions that the numbers belong to."""
    # Not imported: that must wait until the switch is read.
    triton = metadata.version("triton")
    name = "CPU, Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "triton": triton, "cuda": str(torch.version.cuda)}


def show(result: dict[str, Any]) -> None:
    """Print one case."""
    print(f"{result['case']}: {result['shapes']} (kernel and torch differ by {result['difference']:.1e})")
    for name, found in result["contestants"].items():
        memory = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:10.1f} MiB"
        print(f"    {name:14}{found['median_ms']:12.3f} ms{memory}")


def main() -> None:
    """Run all cases, print them, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, through Triton's interpreter")
    parser.add_argument("--runs", type=int, default=20, help="timed runs per contestant")
    parser.add_argument("--warmup", type=int, default=3, help="runs before them")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    os.environ[SWITCH] = "interpret" if args.smoke else "1"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU found; --smoke runs tiny shapes on the CPU")
    runs, warmup = (1, 0) if args.smoke else (args.runs, args.warmup)
    torch.manual_seed(0)
    report: dict[str, Any] = {"environment": environment(device), "runs": runs, "cases": []}
    print(" | ".join(f"{key} {value}" for key, value in report["environment"].items()))
    for size in SMOKE if args.smoke else SIZES:
        for make in (attention_cases, choice_cases, row_cases):
            for case in make(size, device, torch.bfloat16):
                if args.only in case.name:
                    report["cases"].append(measure(case, device, runs, warmup))
                    show(report["cases"][-1])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
