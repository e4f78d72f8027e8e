"""Which neurons are active for a token, and how many of them are active for others."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .select import take, top_k_mask


@selection
def shared_with_word(visual: Tensor, text: Tensor, words: Tensor, place: int) -> Tensor:
    """Return float32 (S, N), how many neurons are active for a token and for one word; 0 where there are no words.

    A neuron is active where its activation is above 0. visual: (S, N, I). text: (S, T, I). words: bool (S, T), which
    are there. place: of the word, counted back from the last, -1 for that; the first where there are fewer.
    """
    order = torch.where(words, torch.arange(words.shape[1], device=words.device), words.shape[1]).sort(1).values
    index = (words.sum(1, keepdim=True) + place).clamp(min=0)
    index = order.gather(1, index).clamp(max=words.shape[1] - 1)
    active = (take(text, index) > 0) & words.any(1)[:, None, None]
    return ((visual > 0) & active).sum(2).float()


@selection
def shared_with_core(visual: Tensor, mask: Tensor, text: Tensor, words: Tensor, share: float) -> Tensor:
    """Return float32 (S, N), how many of the neurons that are active for most tokens and words are active for a token.

    visual: (S, N, I), with mask bool (S, N). text: (S, T, I), with words bool (S, T). share: of the neurons that are
    the core, rounded half up; ties take the first.
    """
    active, said = (visual > 0) & mask[..., None], (text > 0) & words[..., None]
    often = active.sum(1) + said.sum(1)
    core = top_k_mask(often.float(), torch.ones_like(often, dtype=torch.bool), int(share * often.shape[1] + 0.5))
    return (active & core[:, None]).sum(2).float()
