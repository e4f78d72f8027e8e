"""Runs of frames that are alike, and where in them anchors stand."""

from __future__ import annotations

from collections.abc import Sequence


def alike_runs(likeness: Sequence[float], fewest: int, bar: float) -> list[tuple[int, int]]:
    """Return (first, last) of the runs of frames: cut where a frame is least like the next, or less than the bar.

    likeness: of each frame to the next one. fewest: runs at least, so that the fewest - 1 least alike are cut; of equal
    ones the earlier. arXiv 2503.11187.
    """
    least = sorted(range(len(likeness)), key=lambda n: (likeness[n], n))[: max(fewest - 1, 0)]
    cuts = sorted({*least, *(n for n, value in enumerate(likeness) if value < bar)})
    first = [0, *(cut + 1 for cut in cuts)]
    return list(zip(first, [*cuts, len(likeness)], strict=True))


def anchors_per_frame(runs: Sequence[tuple[int, int]], context: int, period: int) -> list[int]:
    """Return for each frame how many anchors it has: every `period`-th of a run, counted from its last, shares them.

    context: anchors of a frame on average; what rounding down leaves is lost.
    """
    counts = []
    for first, last in runs:
        length = last - first + 1
        each = context * length // -(-length // period)
        counts += [each if (last - frame) % period == 0 else 0 for frame in range(first, last + 1)]
    return counts
