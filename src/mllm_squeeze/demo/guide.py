"""Help that the language model gets in the first part of a training stage."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .pack import NAMED, TOKENS, Packed
from .tower import HEADS, IGNORE


class Guide(nn.Module):
    """Two more losses; without them, 450 steps taught the model nothing but which words can answer which question.

    At the input of the first of these decoder layers, the answering token must know which words the question holds;
    in all of them, it must look at the things that fit those words.
    """

    def __init__(self, model: LlavaForConditionalGeneration, layers: tuple[int, ...]) -> None:
        super().__init__()
        decoder: Any = model.model.language_model
        # In a plain list, so that the parameters of the language model do not count as the guide's own.
        self.watched = [decoder.layers[layer].self_attn for layer in layers]
        self.heads = nn.ModuleList(nn.Linear(decoder.config.hidden_size, len(HEADS[name]) + 1) for name in NAMED)
        self.inputs: dict[nn.Module, dict[str, Any]] = {}
        self.hooks = [attention.register_forward_pre_hook(self._keep, with_kwargs=True) for attention in self.watched]

    def _keep(self, module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs[module] = kwargs

    def leave(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def read(self, batch: Packed) -> torch.Tensor:
        """The loss for naming the words of the question, from the answering tokens."""
        hidden = self.inputs[self.watched[0]]["hidden_states"]
        states = hidden[torch.arange(len(hidden), device=hidden.device)[:, None], batch.ask]
        parts = [
            F.cross_entropy(head(states).flatten(0, 1), batch.named[..., i].flatten(), ignore_index=IGNORE)
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(parts).sum()

    def look(self, batch: Packed) -> torch.Tensor:
        """How little of the answering tokens' attention falls on the things asked about: mean of -log of the share."""
        return torch.stack([self._look(attention, batch) for attention in self.watched]).mean()

    def _look(self, attention: Any, batch: Packed) -> torch.Tensor:
        """The same for one layer, whose attention [B, heads, Q, S] is computed again from the layer's input."""
        kept = self.inputs[attention]
        hidden, (cos, sin) = kept["hidden_states"], kept["position_embeddings"]
        q = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        rows = torch.arange(len(q), device=q.device)[:, None]
        q = q.transpose(1, 2)[rows, batch.ask].transpose(1, 2)
        allowed = batch.mask[:, 0][rows, batch.ask][:, None]
        weights = (q @ k.transpose(2, 3) * attention.scaling).float().masked_fill(~allowed, -math.inf).softmax(-1)
        on_things = (weights[..., 2 : 2 + TOKENS].mean(1) * batch.spots).sum(-1)
        away: torch.Tensor = -(on_things[batch.spots.any(-1)] + 1e-4).log().mean()
        return away
