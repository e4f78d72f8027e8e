"""The rules of the methods for one span, token by token in plain Python floats; indices in, indices out."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Vectors = Sequence[Vector]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(rows: Vectors) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def best(scores: Sequence[float], among: Sequence[int], k: int) -> list[int]:
    """The k indices of largest score, best first, lower index first on ties."""
    return sorted(among, key=lambda i: (-scores[i], i))[:k]


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    e = [math.exp(x - top) for x in row]
    return [x / math.fsum(e) for x in e]


# SparseVLM


def raters(visual: Vectors, text: Vectors) -> list[int]:
    rows = [softmax([dot(v, t) for t in text]) for v in visual]
    r = [math.fsum(row[t] for row in rows) / len(rows) for t in range(len(text))]
    above = [t for t in range(len(text)) if r[t] > 1 / len(text) + 1e-9]
    return above or list(range(len(text)))


def recycle_total(current: int, keep: int) -> tuple[int, int, int]:
    """Tokens after a stage that keeps `keep` by rank: (total, candidates, clusters)."""
    dropped = current - keep
    candidates = int(0.3 * dropped) + 1
    clusters = int(candidates / 10) + 1
    return keep + clusters, candidates, clusters


def density_peaks(x: Vectors, clusters: int) -> list[int]:
    """The centre of each token."""
    n = len(x)
    d = [[math.dist(a, b) / math.sqrt(len(a)) for b in x] for a in x]
    rho = [math.exp(-math.fsum(v * v for v in sorted(row)[:clusters]) / clusters) for row in d]

    def denser(j: int, i: int) -> bool:
        return rho[j] > rho[i] + 1e-15 or (abs(rho[j] - rho[i]) <= 1e-15 and j < i)

    largest = max(max(row) for row in d)
    delta = [min([d[i][j] for j in range(n) if denser(j, i)], default=largest) for i in range(n)]
    centres = best([a * b for a, b in zip(rho, delta, strict=True)], range(n), clusters)
    return [i if i in centres else min(sorted(centres), key=lambda c: d[i][c]) for i in range(n)]


def sparsevlm(scores: Vector, x: Vectors, budget: int) -> dict[int, int]:
    """Token -> the survivor that it goes to."""
    n = len(scores)
    if budget >= n:
        return {i: i for i in range(n)}
    fitting = [k for k in range(1, n) if recycle_total(n, k)[0] == budget]
    if fitting:
        keep = max(fitting)
        _, candidates, clusters = recycle_total(n, keep)
    else:
        keep, clusters = budget - budget // 2, budget // 2
        candidates = max(recycle_total(n, keep)[1], clusters) if clusters else 0
    top = best(scores, range(n), keep)
    out = {i: i for i in top}
    if candidates:
        again = sorted(best(scores, [i for i in range(n) if i not in top], candidates))
        for i, centre in zip(again, density_peaks([x[i] for i in again], clusters), strict=True):
            out[i] = again[centre]
    return out


# VisionZip


def visionzip(saliency: Vector, keys: Vectors, budget: int) -> dict[int, int]:
    n = len(saliency)
    budget = min(budget, n)
    contextual = int(budget / 6.4 + 0.5)
    pictures = [i for i in range(n) if saliency[i] != -math.inf]
    dominant = best(saliency, pictures, budget - contextual)
    out = {i: i for i in dominant}
    left = [i for i in pictures if i not in dominant]
    step = max(1, len(left) // max(1, contextual))
    targets = [left[s] for s in range(0, len(left), step)][:contextual]
    out.update({i: i for i in targets})
    for i in left:
        if i not in out and targets:
            out[i] = max(targets, key=lambda t: (round(cosine(keys[i], keys[t]), 9), -t))
    separators = [i for i in range(n) if i not in pictures]
    out.update({i: i for i in separators[: budget - len(set(out.values()))]})
    return out


# DivPrune


def divprune(x: Vectors, budget: int) -> list[int]:
    """Picks in order."""
    n = len(x)
    d = [[1 - cosine(a, b) for b in x] for a in x]
    nearest = [min([d[i][j] for j in range(n) if j != i], default=math.inf) for i in range(n)]
    picks = [best(nearest, range(n), 1)[0]]
    while len(picks) < min(budget, n):
        m = [min(d[s][i] for s in picks) for i in range(n)]
        picks.append(best(m, [i for i in range(n) if i not in picks], 1)[0])
    return picks


# DART


def dart(
    norms: Vector, x: Vectors, word_norms: Vector, words: Vectors, total: int, pivots: int, spoken: int
) -> set[int]:
    n = len(x)
    image = best(norms, range(n), min(pivots, total))
    text = best(word_norms, range(len(words)), spoken)
    out = set(image)
    everyone = [x[i] for i in image] + [words[i] for i in text]
    rest = min(total, n) - len(image)
    for turn, pivot in enumerate(everyone):
        quota = rest // len(everyone) + (turn < rest % len(everyone))
        left = [i for i in range(n) if i not in out]
        out |= set(best([-cosine(pivot, row) for row in x], left, quota))
    return out


# ToMe


def tome(keys: Vectors, budget: int, lead: int) -> dict[int, int]:
    n = len(keys)
    r = min(max(0, n - budget), n // 2)
    sources = [i for i in range(n) if (i + lead) % 2 == 0]
    targets = [i for i in range(n) if (i + lead) % 2 == 1]
    match = {a: max(targets, key=lambda b: (cosine(keys[a], keys[b]), -b)) for a in sources if targets}
    order = sorted(match, key=lambda a: (-cosine(keys[a], keys[match[a]]), a))
    return {i: i for i in range(n)} | {a: match[a] for a in order[:r]}


# VidCom2


def vidcom2(frames: Sequence[Vectors], r: float, channels: float, temperature: float) -> list[list[int]]:
    """Kept indices of each frame."""
    tokens = [x for frame in frames for x in frame]
    centre = mean(tokens)
    variance = [math.fsum((x[c] - centre[c]) ** 2 for x in tokens) / len(tokens) for c in range(len(centre))]
    quiet = sorted(best([-v for v in variance], range(len(variance)), int(channels * len(variance))))

    def normed(x: Vector) -> list[float]:
        y = [x[c] for c in quiet]
        return [v / math.sqrt(dot(y, y)) for v in y]

    def gaussian(a: Vector, b: Vector) -> float:
        return math.fsum(math.exp(-(math.dist(a, b) ** 2) / (2 * 2.0**k)) for k in (-3, -2, -1, 0, 1))

    frames = [[normed(x) for x in frame] for frame in frames]
    video = mean([x for frame in frames for x in frame])
    v = [[gaussian(x, video) for x in frame] for frame in frames]
    f = [[gaussian(x, mean(frame)) for x in frame] for frame in frames]
    p = softmax([-(math.fsum(row) / len(row)) / temperature for row in v])
    out = []
    for t, frame in enumerate(frames):
        scale = min(r * (1 + p[t] - 1 / len(frames)), 1)
        k = max(1, round(scale * len(frame)))
        out.append(sorted(best([-(a + b) for a, b in zip(v[t], f[t], strict=True)], range(len(frame)), k)))
    return out


# DyCoke


def dycoke(frames: Sequence[Vectors], budget: int, forget: bool = False) -> list[list[int]]:
    """Kept indices of each frame; forget leaves frame 2 of the last window whole, as the authors' loop does."""
    area = len(frames[0])
    starts = range(0, len(frames), 4)
    prunable = len(frames) - len(starts)
    limit = max(0, math.floor((budget - len(starts) * area) / prunable)) if prunable else area
    out = [list(range(area)) for _ in frames]
    for start in starts:
        for step, reference in ((1, 0), (2, 0), (3, 2)):
            if start + step < len(frames) and not (forget and step == 2 and start >= len(frames) - 4):
                pairs = zip(frames[start + step], frames[start + reference], strict=True)
                out[start + step] = sorted(best([-cosine(a, b) for a, b in pairs], range(area), limit))
    return out


# Pooling


def windows(height: int, width: int, high: int, wide: int) -> list[list[int]]:
    """The cells of each window, raster order."""
    out: list[list[int]] = [[] for _ in range(high * wide)]
    for h in range(height):
        for w in range(width):
            out[(h * high // height) * wide + w * wide // width].append(h * width + w)
    return out
