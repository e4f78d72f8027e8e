"""Rules inside the language model, for one span, token by token in plain Python. Lists stand for tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reference.rules import best, cosine

Vectors = Sequence[Sequence[float]]


def beyond_prior(attention: Sequence[float], prior: Sequence[float]) -> list[float]:
    """Each token's share of the divergence of attention from its prior; the attention where they are the same."""
    p = [a / (math.fsum(attention) + 1e-10) for a in attention]
    q = [a / (math.fsum(prior) + 1e-10) for a in prior]
    same = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(p, q, strict=True))
    return p if same else [a * math.log((a + 1e-10) / (b + 1e-10)) for a, b in zip(p, q, strict=True)]


def merged_into_best(x: Vectors, score: Sequence[float], k: int) -> tuple[list[int], dict[int, int]]:
    """The survivors, and who goes into whom."""
    n = len(score)
    order = best(score, range(n), min(n, k + k // 2))
    better, worse = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
    target = {i: max(better, key=lambda t: (cosine(x[i], x[t]), -t)) for i in worse} if better else {}
    alike = [cosine(x[i], x[target[i]]) if i in target else 0.0 for i in range(n)]
    merged = best(alike, worse, len(order) - min(k, n))
    return sorted(set(order) - set(merged)), {i: target[i] for i in merged}
