"""Where the parts of a HuggingFace model are, by the names that transformers gives its modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.names import ENCODED, ENCODED_MASK
from mllm_squeeze.upstream.signatures import forward_parameters

_TOWERS = (
    "visual",
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "image_tower",
    "video_tower",
    "audio_tower",
    "encoder",
    "embed_tokens_extend.image_embed.img_processor",
)
_EMBEDDERS = ("embed_tokens_extend.image_embed",)
_BLOCKS = (
    "encoder.layers",
    "encoder.layer",
    "blocks",
    "layers",
    "transformer.layers",
    "transformer.encoder.layers",
    "model.layers",
    "vision_model.encoder.layers",
    "vision_encoder.layers",
    "vision_encoder.encoder.layers",
)
_PROJECTORS = (
    "multi_modal_projector",
    "vision_projection",
    "visual.merger",
    "merger",
    "projector",
    "connector",
    "mlp1",
    "aligner",
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
# BERT-like blocks wrap the attention that calls the registry in one more module.
_WRAPPED_ATTENTION = ("attention", "self", "self_attn")
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")
_PRE_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1", "norm1", "operator_norm", "attention_layernorm")
# Layers that have these and none of the above normalise what their parts give, not what they get.
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_AS_IT_IS = nn.Identity()
# Where an encoder-decoder keeps the half that writes.
_READING_DECODERS = ("decoder", "language_model.decoder")
_TEXT_MODELS = ("language_model", "text_model", "model", "decoder")
# What a stack takes that refines a block of the answer, beside a cache which another stack filled.
_CANVAS = "decoder_input_ids"
_CLASS_TOKENS = ("class_embedding", "cls_token")
_POSITION_TABLES = ("position_embedding", "pos_embed", "positional_embedding")


def of_pipeline(model: Any) -> Any:
    """Return the model of a pipeline of transformers, and anything else as it is."""
    found = None if isinstance(model, nn.Module) else getattr(model, "model", None)
    return found if isinstance(found, nn.Module) else model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the HuggingFace model inside PEFT, torch.compile, data-parallel and FSDP wrappers, in any nesting.

    Of an omni model it is the thinker, which all of the prompt goes through.
    """
    inner = _inside(model)
    while inner is not None and inner is not model:
        model, inner = inner, _inside(inner)
    return model


def is_read_on(model: nn.Module) -> bool:
    """Say whether a second model, which speaks, goes on from what every layer of this one gave for the whole prompt."""
    inner: nn.Module | None = model
    while inner is not None:
        if first_of(inner, ("talker",)) is not None:
            return True
        model, inner = inner, _inside(inner)
        if inner is model:
            return False
    return False


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    # What torch.compile returns hands every other attribute on to the model inside, so it must be asked for first.
    if not isinstance(model, nn.Module):
        return None
    for name in ("_orig_mod", "_fsdp_wrapped_module"):
        wrapped = model._modules.get(name)
        if wrapped is not None:
            return wrapped
    get_base: Any = getattr(model, "get_base_model", None)
    if callable(get_base):
        return get_base()
    return first_of(model, ("thinker",))


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """Return the module inside of what torch.compile returned, None where a module is none of these."""
    return model._modules.get("_orig_mod")


def first_of(root: nn.Module | None, paths: tuple[str, ...]) -> Any:
    """Return the first module that stands at one of these dotted paths, None where none does."""
    for path in paths:
        found: Any = root
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def base_of(model: nn.Module) -> nn.Module:
    """Return the inner model, which puts the features where the placeholders are."""
    found: nn.Module = getattr(model, "base_model", model)
    return found


def decoder_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Return the text model and its decoder layers.

    Raises:
        UnsupportedModelError: none is found.
    """
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    seen: set[int] = set()
    while isinstance(decoder, nn.Module) and id(decoder) not in seen:
        seen.add(id(decoder))
        layers = getattr(decoder, "layers", None)
        if isinstance(layers, nn.ModuleList) and hasattr(decoder, "embed_tokens"):
            _refuse_canvas(model, decoder)
            return decoder, layers
        decoder = first_of(decoder, _TEXT_MODELS)
    raise UnsupportedModelError(
        f"No decoder layers found in {type(model).__name__}: expected a text model with `layers` and `embed_tokens` "
        "behind get_decoder(). Encoder-decoder models cannot be cut at a layer."
    )


def reading_decoder_of(base: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Return the decoder that attends to what an encoder gave, and its layers.

    Raises:
        UnsupportedModelError: none is found.
    """
    for path in _READING_DECODERS:
        found: Any = first_of(base, (path,))
        layers = None if found is None else next((m for m in found.modules() if isinstance(m, nn.ModuleList)), None)
        if layers is not None and {ENCODED, ENCODED_MASK} <= set(forward_parameters(found)):
            return found, layers
    raise UnsupportedModelError(
        f"No decoder was found in {type(base).__name__} that takes `{ENCODED}` and `{ENCODED_MASK}`: expected one at "
        f"{', '.join(_READING_DECODERS)}."
    )


def _refuse_canvas(model: nn.Module, decoder: nn.Module) -> None:
    if _CANVAS in forward_parameters(decoder):
        raise UnsupportedModelError(
            f"{type(model).__name__} writes its answers with a second stack, {type(decoder).__name__}, all tokens of a "
            "block at once, which reads the keys that the first stack made of the prompt and counts its places by "
            "them. A cut of the first would move the places of the second. The model was left as it was."
        )


def tower_of(base: nn.Module) -> nn.Module | None:
    """Return the first encoder of pictures or sound, None where none is found."""
    return first_of(base, _TOWERS)


def sound_tower_of(base: nn.Module) -> nn.Module | None:
    """Return the encoder of sound, None where none is found."""
    found: nn.Module | None = first_of(base, ("audio_tower",))
    return found


def blocks_of(tower: nn.Module | None) -> nn.ModuleList | None:
    """Return the blocks of an encoder, None where none are found."""
    found = None if tower is None else first_of(tower, _BLOCKS)
    return found if isinstance(found, nn.ModuleList) else None


def projector_of(base: nn.Module) -> nn.Module | None:
    """Return what maps the encoder's features to those that the LLM gets, None where it is not found."""
    return first_of(base, _PROJECTORS)


def embedder_of(base: nn.Module) -> nn.Module | None:
    """Return the module inside a text model that encodes pictures and puts them in, None without one."""
    found: nn.Module | None = first_of(base, _EMBEDDERS)
    return found


def queries_of(base: nn.Module) -> nn.Module | None:
    """Return the Q-Former whose queries attend to the image features, None without one."""
    return first_of(base, ("qformer",))


def attention_of(layer: nn.Module) -> nn.Module | None:
    """Return the attention module of a decoder layer or encoder block, None where it has none."""
    found = first_of(layer, _ATTENTION)
    if found is None:
        return None
    return found if hasattr(found, "config") else first_of(found, _WRAPPED_ATTENTION) or found


def is_packed(attention: nn.Module) -> bool:
    """Say whether an attention module takes inputs of several lengths one after the other, and where each begins."""
    return "cu_seqlens" in forward_parameters(attention)


def is_causal(attention: nn.Module | None) -> bool:
    """Say whether an attention module closes later tokens where it gets no mask."""
    return bool(getattr(attention, "is_causal", True))


def pre_norm_of(layer: nn.Module) -> nn.Module | None:
    """Return the norm in front of the attention of a decoder layer, None where it is not found."""
    found: nn.Module | None = first_of(layer, _PRE_NORMS)
    if found is None and all(name in layer._modules for name in _POST_NORMS):
        return _AS_IT_IS
    return found


def final_norm_of(decoder: nn.Module) -> nn.Module | None:
    """Return the norm behind the last decoder layer, None where it is not found."""
    return first_of(decoder, _FINAL_NORMS)


def has_class_token(tower: nn.Module) -> bool:
    """Say whether an encoder puts a CLS token in front of its patches."""
    return _names_class_token(_own_weights(tower, blocks_of(tower)))


def patch_places(tower: nn.Module, blocks: nn.ModuleList | None) -> tuple[bool, int | None]:
    """Return whether an encoder puts a CLS token in front of its patches, and how many places it has learned positions.

    blocks: those of the encoder. The positions are (n, D) or (1, n, D); None where no weight is clearly theirs.
    """
    weights = _own_weights(tower, blocks)
    tables = [
        weight
        for name, weight in weights.items()
        if weight.ndim >= 2 and any(word in name for word in _POSITION_TABLES)
    ]
    return _names_class_token(weights), int(tables[0].shape[-2]) if len(tables) == 1 else None


def _names_class_token(weights: Iterable[str]) -> bool:
    return any(word in name for name in weights for word in _CLASS_TOKENS)


def _own_weights(tower: nn.Module, blocks: nn.ModuleList | None) -> dict[str, nn.Parameter]:
    """Return the weights of an encoder that are no part of its blocks, of which there may be hundreds."""
    found: dict[str, nn.Parameter] = {}
    waiting = [("", tower)]
    while waiting:
        path, module = waiting.pop()
        found.update({f"{path}{name}": weight for name, weight in module._parameters.items() if weight is not None})
        waiting += [
            (f"{path}{name}.", child)
            for name, child in module._modules.items()
            if child is not None and child is not blocks
        ]
    return found
