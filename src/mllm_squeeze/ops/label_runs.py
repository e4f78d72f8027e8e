"""Labels of frames made whole: each label in one run, so that the video is cut into few pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def whole_runs(labels: Sequence[int]) -> list[int]:
    """Return labels of which each keeps its longest run, all of them where several are longest.

    A label whose longest run is one frame keeps none. What loses its label takes that of the longer run beside it, as
    it is by then, from the left; the left one of equal ones, 0 where there is none. arXiv 2412.16117.
    """
    runs = _runs(labels)
    longest = {label: max(size for name, size in runs if name == label) for label in set(labels)}
    left = [(label if size == longest[label] and size > 1 else None, size) for label, size in runs]
    left = [(name, sum(size for _, size in same)) for name, same in groupby(left, key=lambda run: run[0])]
    out: list[int] = []
    for number, (label, size) in enumerate(left):
        before = _runs(out)[-1] if out else (0, 0)
        after = left[number + 1] if number + 1 < len(left) else (None, 0)
        if label is None:
            label = after[0] if after[0] is not None and after[1] > before[1] else before[0]
        out += [label] * size
    return out


def run_bounds(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of equal labels."""
    bounds, first = [], 0
    for _, size in _runs(labels):
        bounds.append((first, first + size - 1))
        first += size
    return bounds


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    return [(label, len(list(same))) for label, same in groupby(labels)]
