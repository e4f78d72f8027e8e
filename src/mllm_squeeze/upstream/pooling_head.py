"""The head that pools the patches of a vision encoder by the attention of one learned query (SigLIP)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mllm_squeeze.upstream.modules import first_of

_HEADS = ("head", "vision_model.head")
_LAST_NORMS = ("post_layernorm", "vision_model.post_layernorm")


def head_of(tower: nn.Module) -> nn.Module | None:
    """Return the pooling head of an encoder, None where it has none whose query and keys can be computed."""
    head = first_of(tower, _HEADS)
    attention = getattr(head, "attention", None)
    if not isinstance(attention, nn.MultiheadAttention) or not isinstance(getattr(head, "probe", None), Tensor):
        return None
    readable = attention.in_proj_weight is not None and not attention.in_proj_weight.is_meta
    return head if readable and first_of(tower, _LAST_NORMS) is not None else None


def query_and_keys(tower: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the query (tiles, H, 1, d) of an encoder's pooling head, and the keys (tiles, H, N, d) that it looks at.

    states: (tiles, N, D) as a block gives them; the norm behind the last block comes in between, as for the head.
    """
    head: Any = head_of(tower)
    norm: Any = first_of(tower, _LAST_NORMS)
    attention = head.attention
    width, bias = attention.embed_dim, attention.in_proj_bias

    def project(given: Tensor, part: slice) -> Tensor:
        projected = functional.linear(given, attention.in_proj_weight[part], None if bias is None else bias[part])
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    probe = head.probe.expand(states.shape[0], -1, -1)
    return project(probe, slice(0, width)), project(norm(states), slice(width, 2 * width))
