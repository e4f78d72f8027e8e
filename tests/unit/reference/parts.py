"""What parts do, for one span, token by token in plain Python; indices in, indices out. Lists stand for tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reference.rules import best, cosine, mean

Vectors = Sequence[Sequence[float]]


def normalised(scores: Sequence[float], how: str) -> list[float]:
    n = len(scores)
    if how == "minmax":
        low, high = min(scores), max(scores)
        return [(s - low) / (high - low) if high > low else 0.0 for s in scores]
    if how == "zscore":
        middle = math.fsum(scores) / n
        deviation = math.sqrt(math.fsum((s - middle) ** 2 for s in scores) / n)
        return [(s - middle) / deviation if deviation else 0.0 for s in scores]
    if how == "softmax":
        e = [math.exp(s - max(scores)) for s in scores]
        return [x / math.fsum(e) for x in e]
    if how == "rank":
        order = best(scores, range(n), n)
        return [1 - order.index(i) / n for i in range(n)]
    return list(scores)


def text_similarity(visual: Vectors, text: Vectors, over: str) -> list[float]:
    rows = [[cosine(v, t) for t in text] for v in visual]
    return [max(row) if over == "max" else math.fsum(row) / len(row) for row in rows]


def isolation(x: Vectors) -> list[float]:
    return [1 - max([cosine(a, b) for j, b in enumerate(x) if j != i], default=-1.0) for i, a in enumerate(x)]


def uniqueness(x: Vectors, group: Sequence[int], against: str, channels: float) -> list[float]:
    """Minus the sum of five gaussian kernels of the distance to the mean of the span or group."""
    middle = mean(x)
    variance = [math.fsum((row[c] - middle[c]) ** 2 for row in x) / len(x) for c in range(len(middle))]
    quiet = set(best([-v for v in variance], range(len(middle)), int(channels * len(middle))))
    kept = [[v if c in quiet else 0.0 for c, v in enumerate(row)] for row in x]
    unit = [[v / math.sqrt(math.fsum(w * w for w in row)) for v in row] for row in kept]
    out = []
    for i, row in enumerate(unit):
        others = unit if against == "span" else [r for r, g in zip(unit, group, strict=True) if g == group[i]]
        square = math.dist(row, mean(others)) ** 2
        out.append(-math.fsum(math.exp(-square / (2 * 2.0**k)) for k in range(-3, 2)))
    return out


def shared(total: int, sizes: Sequence[int]) -> list[int]:
    """Largest remainder in proportion to the sizes; ties take the first group."""
    exact = [total * size / sum(sizes) for size in sizes]
    out = [math.floor(e + 1e-12) for e in exact]
    order = sorted(range(len(sizes)), key=lambda g: (-(exact[g] - out[g]), g))
    for g in order[: total - sum(out)]:
        out[g] += 1
    return out


def mass(scores: Sequence[float], share: float) -> int:
    """The fewest tokens, best first, that hold a share of the sum."""
    total, held = math.fsum(max(s, 0) for s in scores), 0.0
    for count, s in enumerate(sorted(scores, reverse=True), 1):
        held += max(s, 0)
        if held >= share * total * (1 - 1e-9):
            return count
    return len(scores)


def farthest(x: Vectors, k: int) -> list[int]:
    d = [[1 - cosine(a, b) for b in x] for a in x]
    n = len(x)
    nearest = [min([d[i][j] for j in range(n) if j != i], default=math.inf) for i in range(n)]
    picks: list[int] = []
    while len(picks) < min(k, n):
        left = [i for i in range(n) if i not in picks]
        far = nearest if not picks else [min(d[i][p] for p in picks) for i in range(n)]
        picks.append(best(far, left, 1)[0])
    return sorted(picks)


def cover(x: Vectors, k: int) -> list[int]:
    """Greedy facility location of (1 + cosine) / 2."""
    n = len(x)
    alike = [[(1 + cosine(a, b)) / 2 for b in x] for a in x]
    covered, picks = [0.0] * n, []
    while len(picks) < min(k, n):
        gain = [math.fsum(max(alike[i][j] - covered[j], 0) for j in range(n)) for i in range(n)]
        pick = best(gain, [i for i in range(n) if i not in picks], 1)[0]
        picks.append(pick)
        covered = [max(covered[j], alike[pick][j]) for j in range(n)]
    return sorted(picks)


def strided(among: Sequence[int], k: int, step: str) -> list[int]:
    n = len(among)
    if k >= n:
        return list(among)
    if k == 0:
        return []
    if step == "even":
        return [among[i * n // k] for i in range(k)]
    return [among[i * (n // k)] for i in range(k)]


def nearest(x: Vectors, members: Sequence[int], targets: Sequence[int]) -> dict[int, int]:
    """Each member's most similar target."""
    return {i: max(targets, key=lambda t: (cosine(x[i], x[t]), -t)) for i in members} if targets else {}


def still(x: Vectors, frames: int, height: int, width: int, window: int, threshold: float) -> list[int]:
    """The group of each token: twice its window, one more where it moves."""
    area = height * width
    out = []
    for i in range(frames * area):
        frame, cell = divmod(i, area)
        first = frame // window * window
        inside = range(first, min(first + window, frames))
        calm = [cosine(x[f * area + cell], x[(f - 1) * area + cell]) >= threshold for f in inside if f > first]
        out.append(2 * (frame // window) + (0 if calm and all(calm) else 1))
    return out
