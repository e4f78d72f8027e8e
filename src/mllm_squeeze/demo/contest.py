"""What a comparison measures: the answers of each method, and prefills in which all methods take turns."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress

import mllm_squeeze as squeeze
from mllm_squeeze.reporting.report import Report

from .evaluate import answers, prompt
from .questions import Item

DENSE = "dense"


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    tokens: visual tokens per picture left in the end. tokens_per_layer: their mean over the decoder layers. accuracy,
    error: share of answers whose first word is right and its standard error. exact, exact_error: the same for the whole
    answer, which must be that word and nothing else. ended: share of answers that stopped after their word.
    against_dense, against_dense_error: the paired difference in accuracy. by_kind: accuracy for each kind of question.
    seconds: median of the timed prefills of one batch, vision encoder included, None where none was timed; seconds_low
    and seconds_high are the quartiles. flops: of the language model's prefill, for one prompt.
    """

    method: str
    ratio: float
    tokens: float
    tokens_per_layer: float
    accuracy: float
    error: float
    against_dense: float
    against_dense_error: float
    exact: float
    exact_error: float
    ended: float
    by_kind: dict[str, float]
    flops: float | None
    seconds: float | None
    seconds_low: float | None
    seconds_high: float | None
    seeds: int


@dataclass
class Contender:
    """A copy of the model with one method on it, and what has been seen of it so far."""

    method: str
    ratio: float
    model: Any
    handle: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    right: list[list[float]] = field(default_factory=list)
    exact: list[list[float]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def line_up(
    model: Any, methods: Sequence[str], ratios: Sequence[float]
) -> tuple[list[Contender], dict[str, squeeze.SqueezeError]]:
    """The dense model and a squeezed copy for each method and ratio, so that all of them can be timed in turn.

    Beside them, by method and cut, why those are missing that refuse this model or ratio.
    """
    out, refused = [Contender(DENSE, 0.0, model)], {}
    for ratio in ratios:
        for method in methods:
            twin = copy.deepcopy(model)
            try:
                handle = squeeze.apply(twin, method, ratio=ratio)
            except squeeze.SqueezeError as error:
                refused[f"{method}, {100 * ratio:.0f} %"] = error
                continue
            out.append(Contender(method, ratio, twin, handle, {"ratio": ratio}))
    return out, refused


def measure_accuracy(
    bar: Progress, contenders: list[Contender], processor: Any, items: list[Item], batch: int, seeds: int
) -> None:
    """Let each contender answer all questions, one with chance in it once for each seed."""
    task = bar.add_task("answers", total=sum(_seeds_of(c, seeds) for c in contenders))
    for contender in contenders:
        for seed in range(_seeds_of(contender, seeds)):
            if seed:
                contender.handle.remove()
                contender.handle = squeeze.apply(contender.model, contender.method, **contender.params, seed=seed)
            given = answers(contender.model, processor, items, batch)
            contender.right.append([float(hit(answer, item)) for answer, item in zip(given, items, strict=True)])
            contender.exact.append([float(answer == item.answer) for answer, item in zip(given, items, strict=True)])
            contender.ended.append(statistics.fmean(len(answer.split()) == 1 for answer in given))
            bar.update(task, advance=1, description=f"answers: {contender.method}")
    bar.update(task, description="answers")


def hit(answer: str, item: Item) -> bool:
    """Whether the first word is the answer, whatever follows; the whole answer is counted beside it."""
    return answer.split()[:1] == [item.answer]


def _seeds_of(contender: Contender, seeds: int) -> int:
    """How many seeds to average: one for a method without chance in it."""
    return seeds if contender.handle is not None and "seed" in contender.handle.recipe.params else 1


def _inputs(processor: Any, items: Sequence[Item]) -> Any:
    texts = [prompt(processor, item.question) for item in items]
    return processor(images=[item.picture for item in items], text=texts, padding=True, return_tensors="pt")


def measure_time(bar: Progress, contenders: list[Contender], processor: Any, items: list[Item], repeats: int) -> None:
    """Time a prefill of each contender in turn, so that a slow spell of the machine hits all of them alike.

    With no repeats there is still the one that warms up: the report of each contender is about these items.
    """
    inputs = _inputs(processor, items)
    task = bar.add_task("prefill", total=(repeats + 1) * len(contenders))
    for turn in range(repeats + 1):
        for contender in contenders:
            begin = time.perf_counter()
            with torch.no_grad():
                contender.model(**inputs, use_cache=True, logits_to_keep=1)
            if turn:  # the first one warms up
                contender.times.append(time.perf_counter() - begin)
            bar.update(task, advance=1)


def summarise(contender: Contender, dense: Contender, reference: Report | None, items: list[Item]) -> Entry:
    """What was seen of a contender, in numbers; `reference` is the report of any squeezed one, for the dense sizes."""
    right, base = mean_rows(contender.right), mean_rows(dense.right)
    accuracy, error = mean_and_error(right)
    exact, exact_error = mean_and_error(mean_rows(contender.exact))
    difference, difference_error = mean_and_error([a - b for a, b in zip(right, base, strict=True)])
    low, middle, high = _quartiles(contender.times)
    tokens, per_layer, flops = _sizes(contender, reference)
    by_kind = {
        kind: statistics.fmean(value for value, item in zip(right, items, strict=True) if item.kind == kind)
        for kind in sorted({item.kind for item in items})
    }
    return Entry(
        method=contender.method,
        ratio=contender.ratio,
        tokens=tokens,
        tokens_per_layer=per_layer,
        accuracy=accuracy,
        error=error,
        against_dense=difference,
        against_dense_error=difference_error,
        exact=exact,
        exact_error=exact_error,
        ended=statistics.fmean(contender.ended),
        by_kind=by_kind,
        flops=flops,
        seconds=middle,
        seconds_low=low,
        seconds_high=high,
        seeds=len(contender.right),
    )


def _sizes(contender: Contender, reference: Report | None) -> tuple[float, float, float | None]:
    """Visual tokens in the end and per layer, and FLOPs, of one prompt; the dense ones are in another's report."""
    if contender.handle is not None:
        report = contender.handle.report()
        n = report.record.batch
        return report.visual_after / n, report.mean_visual / n, None if report.flops is None else report.flops / n
    if reference is None:
        return math.nan, math.nan, None
    n = reference.record.batch
    flops = None if reference.flops_dense is None else reference.flops_dense / n
    return reference.visual_before / n, reference.visual_before / n, flops


def _quartiles(times: list[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    if not times:
        return None, None, None
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return low, middle, high


def mean_rows(rows: list[list[float]]) -> list[float]:
    """Mean over the seeds, for each question."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over the questions."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / math.sqrt(len(values))
