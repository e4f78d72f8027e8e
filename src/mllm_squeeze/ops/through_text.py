"""Tokens that go, round after round, into the seed that says the same of the words as they do."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection
from .score import unit
from .select import compact_indices, positions, take

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


@selection
def entries_through_text(
    x: Tensor,
    text: Tensor,
    words: Tensor,
    seeds: Tensor,
    members: Tensor,
    slots: int,
    rounds: int,
    added: bool,
) -> Entries:
    """Return (span, into, source, weight), each (E,): what goes into the seeds; all other tokens stay as they are.

    In each round a member goes to the seed of largest sum over the words of cosine(member, word) * cosine(seed, word),
    the first on ties; then the seeds move. x: (S, N, D), in one space with text (S, T, D), of which words bool (S, T)
    count. seeds, members: bool (S, N), no token is both. slots: host number, at least the most seeds of a span. added:
    a seed adds the mean of its members in each round; else it becomes the mean of itself, as it was at first, and them.
    """
    x = at_least_float32(x).masked_fill(~(seeds | members)[..., None], 0)
    text = unit(text.masked_fill(~words[..., None], 0))
    index, filled = compact_indices(seeds, slots)
    first = seed = take(x, index)
    said = unit(x) @ text.transpose(1, 2)
    given = members & seeds.any(1, keepdim=True)
    choices, shares = [], []
    for _ in range(rounds):
        alike = said @ (unit(seed) @ text.transpose(1, 2)).transpose(1, 2)
        choice = alike.masked_fill(~filled[:, None], -torch.inf).argmax(2)
        chosen = (choice[:, None] == torch.arange(slots, device=x.device)[:, None]) & given[:, None]
        count = chosen.sum(2)
        count = count.clamp(min=1) if added else count + 1
        share = chosen.to(x.dtype) / count[..., None]
        seed = (seed if added else first / count[..., None]) + share @ x
        choices.append(choice)
        shares.append(share.sum(1))
    itself = positions(x).expand(x.shape[:2])
    into = [torch.where(given, index.gather(1, choice), itself) for choice in choices]
    own = torch.ones_like(shares[-1]).masked_fill(given, 0)
    if not added:
        into, shares = into[-1:], shares[-1:]
        own = torch.where(seeds, _of_seeds(1 / count.to(own.dtype), index, filled, own), own)
    # What goes elsewhere names its seed with its own entry as well, of weight 0.
    return _flat([into[0], *into], itself, [own, *shares])


def _of_seeds(values: Tensor, index: Tensor, filled: Tensor, like: Tensor) -> Tensor:
    """Return values (S, slots) of the seeds at their places (S, N)."""
    width = like.shape[1]
    spread = like.new_zeros(len(like), width + 1)
    return spread.scatter(1, torch.where(filled, index, width), values)[:, :width]


def _flat(into: list[Tensor], itself: Tensor, weights: list[Tensor]) -> Entries:
    """Return the entries of several rounds, one behind the other."""
    span = torch.arange(len(itself), device=itself.device)[:, None].expand_as(itself)
    number = len(into)
    return (
        span.repeat(number, 1).flatten(),
        torch.cat(into).flatten(),
        itself.repeat(number, 1).flatten(),
        torch.cat(weights).flatten(),
    )
