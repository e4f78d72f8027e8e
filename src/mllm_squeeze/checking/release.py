"""Checks at each apply that the release of transformers is what the library expects: refused, not served wrongly."""

from __future__ import annotations

import warnings

from mllm_squeeze.checking.canary import decoding_of, in_words
from mllm_squeeze.errors import SqueezeWarning
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.upstream import contract, versions
from mllm_squeeze.upstream.attention_contract import check_registry
from mllm_squeeze.upstream.broken import Broken
from mllm_squeeze.upstream.cache_contract import check_caches


def broken_expectations(parts: ModelParts) -> list[Broken]:
    """Return what does not hold of the caches, the calls and the attention registry of a model; runs nothing."""
    attentions = contract.one_of_each_class(find_attention(layer) for layer in parts.layers)
    calls = contract.check_calls(parts.decoder, parts.layers, attentions, strict=parts.row.verified)
    registry = [broken for attention in attentions for broken in check_registry(attention)]
    return [*check_caches(), *calls, *registry]


def require_release(parts: ModelParts) -> None:
    """Check that a model can be served on the release that is installed.

    On a release that nobody tried, and for a family that nobody tried, a canary runs as well, once per process.

    Raises:
        UnsupportedModelError: it differs from what the library relies on; the message says in what, and how to go on.
    """
    if parts.row.encoded:
        # Nothing but the decoder's arguments is relied on, and those were looked up when it was found.
        return
    contract.require(broken_expectations(parts))
    if not versions.is_tested() or not parts.row.verified:
        _require_canary(parts)


def _require_canary(parts: ModelParts) -> None:
    name = type(parts.decoder).__name__
    if parts.cross_attention:
        _warn(f"{name} cannot be tried on a stand-in, as its pictures are keys of cross-attention layers")
        return
    verdict = decoding_of(parts)
    if verdict.broken:
        contract.require([Broken(f"a cut of a small {name}", "what masking gives", in_words(verdict.broken))])
    elif not verdict.ran:
        _warn(f"decoding of {name} was not tried: {verdict.why_not}")


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}. Compare an answer with handle.using(off=True) once. {versions.how_to_go_on()}",
        SqueezeWarning,
        stacklevel=4,
    )
