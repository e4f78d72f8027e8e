"""How much of each block of a video leaves, by how much of the sound beside it stays."""

from __future__ import annotations

from collections.abc import Sequence


def block_shares(
    kept: Sequence[float], sizes: Sequence[int], share: float, least: float, most: float, meet: bool = False
) -> tuple[float, ...]:
    """Return the share of each block's tokens that leaves, the less the more of its sound stays.

    Without sound it is `most`, with all of it `least`. From three blocks on, all but the first of the smallest and of
    the largest share are scaled so that `share` of all tokens leaves, and then moved, as far as the bounds let them.
    arXiv 2511.14582. kept: the share of each block's sound that stays. sizes: tokens of each block. meet: whether two
    blocks or one are scaled and moved as well, all of them.
    """

    def bounded(value: float) -> float:
        return min(max(value, least), most)

    shares = [bounded(most + (least - most) * one) for one in kept]
    few = len(shares) <= 2
    if not shares or (few and not meet):
        return tuple(shares)
    ends = set() if few else {shares.index(min(shares)), shares.index(max(shares))}
    others = [n for n in range(len(shares)) if n not in ends]
    target = share * sum(sizes)

    def leaving(blocks: Sequence[int] | set[int]) -> float:
        return sum(shares[n] * sizes[n] for n in blocks)

    now = leaving(others)
    factor = (target - leaving(ends)) / now if now else 1.0
    for n in others:
        shares[n] = bounded(shares[n] * factor)
    move = (target - leaving(range(len(shares)))) / sum(sizes[n] for n in others)
    for n in others:
        shares[n] = bounded(shares[n] + move)
    return tuple(shares)
