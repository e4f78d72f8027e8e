"""What a prefill of a language model costs, from its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm_squeeze.upstream.configs import TextSizes


def layer_flops(sizes: TextSizes, tokens: int, keys: int | None = None, new_keys: int | None = None) -> int:
    """FLOPs of one decoder layer on n tokens that see m keys (m = n if None), a multiply-add counting as two.

    2 n D 2 H d             projections of query and output (H heads of size d)
    + 2 k D 2 G d           projections of key and value (G grouped heads), of k new keys (k = n if None)
    + 2 * 2 n m H d         scores and weighted sum, over the full square (a causal kernel may skip half of it)
    + 2 n M D I             MLP with M matrices (gate, up, down: M = 3) of hidden size D times I
    """
    width, grouped = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    new = tokens if new_keys is None else new_keys
    projections = 2 * sizes.hidden * (tokens * 2 * width + new * 2 * grouped)
    attention = 2 * 2 * tokens * (tokens if keys is None else keys) * width
    return projections + attention + 2 * tokens * sizes.mlp_matrices * sizes.hidden * sizes.intermediate


def prefill_flops(
    sizes: TextSizes, lengths: Sequence[int], keys: Sequence[int] | None = None, new_keys: Sequence[int] | None = None
) -> int:
    """FLOPs of one prompt, with one row of logits (2 D V).

    lengths: tokens that each layer runs on. keys: what it sees, and new_keys what it computes, the same if None.
    """
    keys = lengths if keys is None else keys
    new_keys = lengths if new_keys is None else new_keys
    layers = zip(lengths, keys, new_keys, strict=True)
    return sum(layer_flops(sizes, *layer) for layer in layers) + 2 * sizes.hidden * sizes.vocab


def cache_bytes(sizes: TextSizes, entries: Sequence[int], element_bytes: int) -> int:
    """Bytes of the keys and values of one prompt whose layers hold `entries` each: the sum of 2 n G d b."""
    return sum(entries) * 2 * sizes.kv_heads * sizes.head_dim * element_bytes
