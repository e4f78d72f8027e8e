"""The sizes of a language model, and what a prefill of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the language model.

    intermediate: what one token passes in the MLP (all active experts together). mlp_matrices: 3 in a gated MLP, 2 in a
    plain one.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3

    def layer_flops(self, tokens: int, keys: int | None = None, new_keys: int | None = None) -> int:
        """FLOPs of one decoder layer on n tokens that see m keys (m = n if None), a multiply-add counting as two.

        2 n D 2 H d             projections of query and output (H heads of size d)
        + 2 k D 2 G d           projections of key and value (G grouped heads), of k new keys (k = n if None)
        + 2 * 2 n m H d         scores and weighted sum, over the full square (a causal kernel may skip half of it)
        + 2 n M D I             MLP with M matrices (gate, up, down: M = 3) of hidden size D times I
        """
        width, grouped = self.heads * self.head_dim, self.kv_heads * self.head_dim
        new = tokens if new_keys is None else new_keys
        projections = 2 * self.hidden * (tokens * 2 * width + new * 2 * grouped)
        attention = 2 * 2 * tokens * (tokens if keys is None else keys) * width
        return projections + attention + 2 * tokens * self.mlp_matrices * self.hidden * self.intermediate

    def prefill_flops(
        self, lengths: Sequence[int], keys: Sequence[int] | None = None, new_keys: Sequence[int] | None = None
    ) -> int:
        """FLOPs of one prompt, with one row of logits (2 D V).

        lengths: tokens that each layer runs on. keys: what it sees, and new_keys what it computes, the same if None.
        """
        keys = lengths if keys is None else keys
        new_keys = lengths if new_keys is None else new_keys
        return sum(map(self.layer_flops, lengths, keys, new_keys)) + 2 * self.hidden * self.vocab

    def cache_bytes(self, entries: Sequence[int], element_bytes: int) -> int:
        """Bytes of the keys and values of one prompt whose layers hold `entries` each: the sum of 2 n G d b."""
        return sum(entries) * 2 * self.kv_heads * self.head_dim * element_bytes
