"""Checks at each apply that the release of transformers is what the library expects: refused, not served wrongly."""

from __future__ import annotations

from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.upstream import contract
from mllm_squeeze.upstream.broken import Broken


def broken_expectations(parts: ModelParts) -> list[Broken]:
    """Return what does not hold of the calls of a model's text model; runs nothing."""
    attentions = (find_attention(layer) for layer in parts.layers)
    return contract.check_calls(parts.decoder, parts.layers, attentions, strict=parts.row.verified)


def require_release(parts: ModelParts) -> None:
    """Check that a model can be served on the release that is installed.

    Raises:
        UnsupportedModelError: it differs from what the library relies on; the message says in what, and how to go on.
    """
    contract.require(broken_expectations(parts))
