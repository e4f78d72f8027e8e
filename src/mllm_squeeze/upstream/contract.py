"""What this library expects of transformers, checked each time a method is applied; no forward runs.

A forward that takes an argument which nobody has looked at is refused as well: it may bring something for each token,
which would then not follow a cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache as memoised
from typing import Any

from torch import nn

from mllm_squeeze.errors import SqueezeWarning, UnsupportedModelError
from mllm_squeeze.upstream.broken import Broken
from mllm_squeeze.upstream.names import CACHE_NAMES, EMBEDDINGS, HIDDEN, IDS, MASK, POSITIONS, ROPE, ROUTING, USE_CACHE
from mllm_squeeze.upstream.signatures import forward_parameters
from mllm_squeeze.upstream.versions import how_to_go_on, only_warns


@dataclass(frozen=True)
class Expected:
    """What a forward must take by name, and what else it may take.

    role: the module, in words. required: names, or several names for one role. known: others that somebody looked at.
    """

    role: str
    required: tuple[tuple[str, ...], ...]
    known: frozenset[str]


_CROSS = {"cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"}
_WORDS = {"output_attentions", "output_hidden_states", "return_dict", "output_router_logits", "logits_to_keep"}
_ENCODER_INPUTS = {
    "image_pixel_values",
    "image_sizes",
    "image_attention_mask",
    "audio_input_features",
    "audio_embed_sizes",
    "audio_attention_mask",
    "pixel_values",
    "mm_encoder_outputs",
}

TEXT_MODEL = Expected(
    "text model",
    ((IDS,), (EMBEDDINGS,), (MASK,), (POSITIONS,), CACHE_NAMES, (USE_CACHE,)),
    frozenset(
        {
            "deepstack_visual_embeds",
            "visual_pos_masks",
            "deepstack_features",
            "vision_mask",
            "per_layer_inputs",
            ROUTING,
        }
        | _CROSS
        | _ENCODER_INPUTS
        | _WORDS
    ),
)
LAYER = Expected(
    "decoder layer",
    ((HIDDEN,), (MASK,), CACHE_NAMES),
    frozenset({POSITIONS, ROPE, ROUTING, USE_CACHE, "per_layer_input", "shared_kv_states"} | _CROSS | _WORDS),
)
ATTENTION = Expected(
    "attention",
    ((HIDDEN,), (MASK,), CACHE_NAMES),
    frozenset({POSITIONS, ROPE, USE_CACHE, "shared_kv_states"} | _WORDS),
)


def check_forward(module: nn.Module, expected: Expected, strict: bool = True) -> tuple[Broken, ...]:
    """Return what does not hold of a module's forward.

    strict: arguments that nobody has looked at count too.
    """
    return _check_forward(type(module).forward, type(module).__name__, forward_parameters(module), expected, strict)


@memoised
def _check_forward(
    forward: Callable[..., Any], name: str, taken: tuple[str, ...], expected: Expected, strict: bool
) -> tuple[Broken, ...]:
    what = f"{name}.forward ({expected.role})"
    found = [
        Broken(what, f"an argument {' or '.join(map(repr, names))}", ", ".join(taken))
        for names in expected.required
        if not any(one in taken for one in names)
    ]
    known = {one for names in expected.required for one in names} | expected.known | {"args", "kwargs", "lm_kwargs"}
    new = sorted(set(taken) - known)
    if new and strict:
        found.append(Broken(what, "no argument that nobody has looked at", ", ".join(new)))
    return tuple(found)


def check_rotary(layer: nn.Module, has_rotary: bool) -> tuple[Broken, ...]:
    """Return what does not hold of how a decoder layer gets its rotary tables."""
    taken = forward_parameters(layer)
    if not has_rotary or ROPE in taken:
        return ()
    what = f"{type(layer).__name__}.forward (decoder layer)"
    return (Broken(what, f"an argument '{ROPE}', as the text model has a rotary embedding", ", ".join(taken)),)


def one_of_each_class(modules: Iterable[nn.Module | None]) -> list[nn.Module]:
    """Return the first module of each class."""
    found: dict[type, nn.Module] = {}
    for module in modules:
        if module is not None:
            found.setdefault(type(module), module)
    return list(found.values())


def check_calls(
    decoder: nn.Module, layers: Iterable[nn.Module], attentions: Iterable[nn.Module | None], strict: bool
) -> list[Broken]:
    """Return what does not hold of the calls of a text model, its layers and their attention.

    strict: arguments that nobody has looked at count too; where they do not, a self-check must follow.
    """
    has_rotary = isinstance(getattr(decoder, "rotary_emb", None), nn.Module)
    found = [*check_forward(decoder, TEXT_MODEL, strict)]
    for layer in one_of_each_class(layers):
        found += [*check_forward(layer, LAYER, strict), *check_rotary(layer, has_rotary)]
    for attention in one_of_each_class(attentions):
        found += check_forward(attention, ATTENTION, strict)
    return found


def require(broken: Sequence[Broken]) -> None:
    """Raise where something does not hold, or warn where the user chose so.

    Raises:
        UnsupportedModelError: what was expected, what was found, which releases were tested, and how to go on.
    """
    if not broken:
        return
    what = "; ".join(str(one) for one in broken)
    message = f"This release of transformers is not as the library expects it. {what}. {how_to_go_on()}"
    if not only_warns():
        raise UnsupportedModelError(message)
    warnings.warn(message, SqueezeWarning, stacklevel=2)
