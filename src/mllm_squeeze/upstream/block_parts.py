"""What is inside a decoder layer: its MLP, what it adds to the stream, the projections of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mllm_squeeze.upstream.configs import of_layer
from mllm_squeeze.upstream.modules import attention_of, first_of

What = Literal["query", "key", "value"]

_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
# Layers that hold the projections of their MLP themselves, the first and the last.
_BARE_MLP = ("fc1", "fc2")
_LAST_PROJECTIONS = ("down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h")
_PROJECTIONS: dict[What, str] = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_FUSED = "qkv_proj"
# Norms of what attention and MLP give, in front of the sum. `post_attention_layernorm` is one of them only where the
# MLP has a norm behind it as well; elsewhere it stands in front of the MLP.
_OUT_NORMS = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
    ("post_norm1", "post_norm2"),
)
# Parts of a layer beside attention and MLP that leave alone what these add.
_BESIDE = ("norm", "dropout", "act", "per_layer_", "attn", "attention", *_MLPS, *_BARE_MLP)


@dataclass(frozen=True)
class Projected:
    """Where queries, keys or values come out of an attention module.

    module: the projection. start, size: their place in its output. head: channels of a head.
    """

    module: nn.Module
    start: int
    size: int
    head: int

    def take(self, output: Tensor) -> Tensor:
        """Return (B, M, H, d) of the projection's output (B, M, D)."""
        return output.narrow(-1, self.start, self.size).unflatten(-1, (-1, self.head))


def mlp_of(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return what gets the input of a layer's MLP and what gives its output, None where it is not found."""
    found = first_of(layer, _MLPS)
    if found is not None:
        return found, found
    first, last = (first_of(layer, (name,)) for name in _BARE_MLP)
    return None if first is None or last is None else (first, last)


def last_projection_of(layer: nn.Module) -> nn.Module | None:
    """Return the last projection of a layer's MLP, None where it is not found, as in a mixture of experts."""
    mlp = mlp_of(layer)
    if mlp is None:
        return None
    found: nn.Module | None = mlp[1] if mlp[0] is not mlp[1] else first_of(mlp[1], _LAST_PROJECTIONS)
    return found


def added_of(layer: nn.Module, part: Literal["attention", "mlp"]) -> tuple[nn.Module, float] | None:
    """Return the module whose output a layer adds to the stream, and what it is multiplied with; None if not found."""
    norms = next((pair for pair in _OUT_NORMS if first_of(layer, (pair[1],)) is not None), None)
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    if norms is not None:
        found = first_of(layer, (norms[part == "mlp"],))
    elif part == "attention":
        found = attention_of(layer)
    else:
        mlp = mlp_of(layer)
        found = None if mlp is None else mlp[1]
    return None if found is None else (found, scale)


def strange_parts(layer: nn.Module) -> list[str]:
    """Return the names of a layer's parts of which it is not known whether they change what attention and MLP add."""
    return [name for name, _ in layer.named_children() if not any(word in name for word in _BESIDE)]


def projected_of(attention: nn.Module, what: What) -> Projected | str:
    """Return where an attention module gives queries, keys or values, or the reason why that is not known."""
    fused, module = (first_of(attention, (name,)) for name in (_FUSED, _PROJECTIONS[what]))
    if fused is None and module is None:
        there = ", ".join(name for name, _ in attention.named_children())
        return f"it has no '{_PROJECTIONS[what]}' (it has {there})"
    config = of_layer(getattr(attention, "config", None), getattr(attention, "layer_idx", 0))
    head = getattr(attention, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(head, int) or not isinstance(heads, int) or not isinstance(groups, int):
        return "it does not say how many heads of which size it has"
    if fused is not None:
        return _of_fused(fused, what, heads * head, groups * head, head)
    size = int(getattr(module, "out_features", 0))
    known = (heads if what == "query" else groups) * head
    # Keys may have another number of heads than the config's first word says; queries may come with gates beside them.
    if size % head or (what == "query" and size != known):
        return f"its '{_PROJECTIONS[what]}' gives {size} channels, where {known} were expected"
    return Projected(module, 0, size, head)


def _of_fused(fused: nn.Module, what: What, queries: int, keys: int, head: int) -> Projected | str:
    size = int(getattr(fused, "out_features", 0))
    if size != queries + 2 * keys:
        return f"its '{_FUSED}' gives {size} channels, where {queries + 2 * keys} were expected"
    if what == "query":
        return Projected(fused, 0, queries, head)
    return Projected(fused, queries + (keys if what == "value" else 0), keys, head)
