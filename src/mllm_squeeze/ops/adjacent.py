"""Neighbours in a row that are alike: where they merge, and who goes into whom."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import unit
from .select import positions, top_k_mask


@selection
def adjacent_sites(x: Tensor, label: Tensor, number: Tensor) -> Tensor:
    """Return bool (S, N), the tokens most like the one behind them, in the same group; at most so many.

    x: (S, N, d). label: int64 (S, N), -1 for tokens of no group. number: int64 (S,).
    """
    alike, same = _with_next(x, label)
    return top_k_mask(alike, same, number)


@selection
def sites_above(x: Tensor, label: Tensor, above: float) -> Tensor:
    """Return bool (S, N), the tokens of larger cosine than that to the one behind them, in the same group.

    x: (S, N, d). label: int64 (S, N), -1 for tokens of no group.
    """
    alike, same = _with_next(x, label)
    return same & (alike > above)


def _with_next(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 (S, N), the cosine to the token behind, and bool (S, N), whether it is of the same group."""
    x = unit(x)
    alike = torch.nn.functional.pad((x[:, :-1] * x[:, 1:]).sum(-1), (0, 1))
    same = torch.nn.functional.pad((label[:, :-1] == label[:, 1:]) & (label[:, :-1] >= 0), (0, 1))
    return alike, same


@selection
def every_other_site(sites: Tensor) -> Tensor:
    """Return bool (S, N), of each run of sites the first, third and so on, so that no token has two of them."""
    place = positions(sites).expand_as(sites)
    begins = sites & ~torch.nn.functional.pad(sites[:, :-1], (1, 0))
    first = torch.where(begins, place, 0).cummax(1).values
    return sites & ((place - first) % 2 == 0)


@selection
def joined_runs(sites: Tensor, mask: Tensor) -> Tensor:
    """Return int64 (S, N), the first token of the run that each belongs to, -1 at padding; sites join their next."""
    place = positions(sites).expand_as(sites)
    joined = torch.nn.functional.pad(sites[:, :-1], (1, 0))
    return torch.where(joined, 0, place).cummax(1).values.masked_fill(~mask, -1)
