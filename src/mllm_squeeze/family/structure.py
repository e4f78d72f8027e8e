"""The one adapter: finds decoder, tower, projector and placeholder ids by looking at the model and its config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.errors import UnsupportedModelError, did_you_mean
from mllm_squeeze.family.handlers.cross_attention import has_cross_attention
from mllm_squeeze.family.table import TABLE, FamilyRow

_TOWERS = (
    "visual",
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "image_tower",
    "video_tower",
    "audio_tower",
    "encoder",
)
_BLOCKS = (
    "encoder.layers",
    "encoder.layer",
    "blocks",
    "layers",
    "transformer.layers",
    "transformer.encoder.layers",
    "model.layers",
)
_PROJECTORS = (
    "multi_modal_projector",
    "vision_projection",
    "visual.merger",
    "merger",
    "projector",
    "connector",
    "mlp1",
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_WINDOWED = ("sliding_attention", "chunked_attention")
_RECURRENT = ("linear_attention", "conv", "mamba", "recurrent")
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")
_PRE_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1", "norm1")


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model that the engine hooks.

    model: the HuggingFace model (a PEFT wrapper is looked through). base: the inner model that scatters the features.
    decoder: the text model; layers: its decoder layers. tower, blocks, projector: of the first encoder, None without
    one. ids: placeholder token id of each modality. row: the family's row.
    """

    model: nn.Module
    base: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    row: FamilyRow
    ids: dict[str, int]
    tower: nn.Module | None
    blocks: nn.ModuleList | None
    projector: nn.Module | None

    @property
    def config(self) -> Any:
        """Config of the whole model."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """Config of the text model."""
        return self.decoder.config

    @cached_property
    def mrope(self) -> bool:
        """True where positions have three axes."""
        for name in ("rope_parameters", "rope_scaling"):
            rope = getattr(self.text_config, name, None)
            if isinstance(rope, dict) and rope.get("mrope_section") is not None:
                return True
        return False

    @cached_property
    def rotary(self) -> nn.Module | None:
        """Rotary embedding of the text model, None where positions are learned."""
        return getattr(self.decoder, "rotary_emb", None)

    def rope_kind(self, layer: int) -> str | None:
        """Name of the rotary tables of a layer, None where all layers share one pair."""
        return None if self._rope_kinds is None else self._rope_kinds[layer]

    @cached_property
    def _rope_kinds(self) -> list[str] | None:
        if self.rotary is None:
            return None
        kinds = getattr(self.decoder, "rope_types", None)
        if kinds is None and "layer_type" in inspect.signature(self.rotary.forward).parameters:
            kinds = self.text_config.layer_types
        return None if kinds is None else [str(kind) for kind in kinds]

    def rotate(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """Return the rotary tables of a layer at positions (B, T), as the text model makes them; hidden: (B, T, D)."""
        rotary, kind = self.rotary, self.rope_kind(layer)
        assert rotary is not None
        if kind is None:
            return rotary(hidden, positions)
        # Molmo2 has a module per kind, Gemma 3 one that is told the kind.
        own: Any = getattr(self.decoder, f"rotary_emb_{kind}", None)
        if own is not None or hasattr(self.decoder, "rope_types"):
            return (own or rotary)(hidden, positions)
        return rotary(hidden, positions, kind)

    @cached_property
    def cross_attention(self) -> bool:
        """True where pictures are no part of the text model's sequence, and the text attends to them."""
        return has_cross_attention(self.decoder)

    @property
    def queries(self) -> nn.Module | None:
        """Q-Former whose queries attend to the image features, None without one."""
        return _first(self.base, ("qformer",))

    @property
    def final_norm(self) -> nn.Module | None:
        """Norm behind the last decoder layer."""
        return _first(self.decoder, _FINAL_NORMS)

    @property
    def lead(self) -> int:
        """Special tokens in front of the patches inside the tower: 1 with a CLS token, else 0."""
        return 1 if self.row.cls and self._tower_has_cls else 0

    @property
    def _tower_has_cls(self) -> bool:
        # LLaVA takes CLIP (CLS) or SigLIP (none); the patches' positions tell which one this is.
        return any("class_embedding" in name or "cls_token" in name for name, _ in self._tower_parameters)

    @cached_property
    def _tower_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [] if self.tower is None else list(self.tower.named_parameters())

    @property
    def saliency_block(self) -> int | None:
        """Number of the encoder block whose attention says what the encoder looks at, None without blocks."""
        if self.blocks is None:
            return None
        full = getattr(getattr(self.tower, "config", None), self.row.saliency, None) if self.row.saliency else None
        if full:
            return int(full[-1])
        return self.feature_block if self.lead else max(len(self.blocks) - 2, 0)

    @property
    def feature_layers(self) -> int | list[int]:
        """Which hidden states of the encoder the LLM gets: an index into them, or several whose features are joined."""
        found: Any = getattr(self.config, "vision_feature_layer", None)
        return getattr(self.config, "vision_feature_layers", -1) if found is None else found

    @property
    def feature_block(self) -> int | None:
        """Number of the encoder block whose output the LLM gets, None without blocks."""
        if self.blocks is None:
            return None
        layer = self.feature_layers
        layer = layer if isinstance(layer, int) else layer[0]
        return len(self.blocks) + layer if layer < 0 else layer - 1

    @cached_property
    def kv_sources(self) -> dict[int, int]:
        """For each layer that borrows keys and values, the layer it borrows them from: the last own one of its type."""
        config: Any = self.text_config
        shared = getattr(config, "num_kv_shared_layers", None) or 0
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(self.layers)
        own = len(self.layers) - shared
        last = {kind: number for number, kind in enumerate(kinds[:own])}
        return {number: last[kinds[number]] for number in range(own, len(self.layers)) if kinds[number] in last}

    def window(self, layer: int) -> int | None:
        """Tokens that a layer looks back, None where it sees all."""
        return self._windows[layer]

    @cached_property
    def _windows(self) -> list[int | None]:
        found = getattr(self.text_config, "sliding_window", None)
        size = found if isinstance(found, int) else None
        return [size if kind in (None, *_WINDOWED) else None for kind in self._layer_types]

    @cached_property
    def _layer_types(self) -> list[str | None]:
        # Configs look attributes up slowly, and each decode step asks for every layer.
        return list(getattr(self.text_config, "layer_types", None) or [None] * len(self.layers))

    def is_causal(self, layer: int) -> bool:
        """True where a layer without a mask closes later tokens."""
        return self._causal[layer]

    @cached_property
    def _causal(self) -> list[bool]:
        return [is_causal(find_attention(layer)) for layer in self.layers]

    def has_entries(self, layer: int) -> bool:
        """True where a layer keeps token by token, False for linear attention and convolutions."""
        return self._layer_types[layer] not in _RECURRENT

    def path(self, module: nn.Module | None) -> str | None:
        """Return the dotted name of a part, None where it is not there."""
        return next((name for name, found in self.model.named_modules() if found is module), None)


def find_attention(layer: nn.Module) -> nn.Module | None:
    """Return the attention module of a decoder layer or encoder block, None where it has none."""
    found = _first(layer, _ATTENTION)
    if found is None:
        return None
    # BERT-like blocks wrap the attention that calls the registry in one more module.
    return found if hasattr(found, "config") else _first(found, ("attention", "self", "self_attn")) or found


def is_causal(attention: nn.Module | None) -> bool:
    """Say whether an attention module closes later tokens where it gets no mask."""
    return bool(getattr(attention, "is_causal", True))


def find_pre_norm(layer: nn.Module) -> nn.Module | None:
    """Return the norm in front of the attention of a decoder layer."""
    return _first(layer, _PRE_NORMS)


def find_parts(model: nn.Module, table: Mapping[str, FamilyRow] | None = None) -> ModelParts:
    """Find the parts of a model; a family that is not in the table is taken as its structure tells, unverified.

    Raises:
        UnsupportedModelError: not a HuggingFace model, no visual input, an unknown family, or no decoder layers.
    """
    inner = _unwrap(model)
    config = getattr(inner, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"Got a {type(model).__name__} without a HuggingFace config. Pass a model loaded with transformers, for "
            "example AutoModelForImageTextToText.from_pretrained(...)."
        )
    row = _row_of(inner, model_type, TABLE if table is None else table)
    base = getattr(inner, "base_model", inner)
    decoder, layers = _find_decoder(inner)
    tower = _first(base, _TOWERS)
    blocks = _first(tower, _BLOCKS) if tower is not None else None
    return ModelParts(
        model=inner,
        base=base,
        decoder=decoder,
        layers=layers,
        row=row,
        ids=_placeholder_ids(config, row),
        tower=tower,
        blocks=blocks if isinstance(blocks, nn.ModuleList) else None,
        projector=_first(base, _PROJECTORS),
    )


def _unwrap(model: nn.Module) -> nn.Module:
    """Look through a PEFT wrapper, and take the thinker of an omni model, which all of the prompt goes through."""
    get_base: Any = getattr(model, "get_base_model", None)
    found: nn.Module = get_base() if callable(get_base) else model
    thinker = getattr(found, "thinker", None)
    return thinker if isinstance(thinker, nn.Module) else found


def _row_of(model: nn.Module, model_type: str, table: Mapping[str, FamilyRow]) -> FamilyRow:
    """Return the row of a family; one with several towers has a row per tower."""
    config: Any = model.config
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    row = table.get(f"{model_type}+{vision}") or table.get(model_type)
    if row is not None:
        return row
    modalities = tuple(m for m in ("image", "video", "audio") if _token_id(config, m) is not None)
    if modalities:
        return FamilyRow(model_type, modalities, grid="unknown", verified=False)
    raise UnsupportedModelError(
        f"'{model_type}' ({type(model).__name__}) is no multimodal family that is known, and its config names no "
        f"placeholder for images, videos or audio. {did_you_mean(model_type, table)} A text-only model has no visual "
        "tokens to squeeze."
    )


def _first(root: nn.Module | None, paths: tuple[str, ...]) -> Any:
    for path in paths:
        found: Any = root
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    seen: set[int] = set()
    while isinstance(decoder, nn.Module) and id(decoder) not in seen:
        seen.add(id(decoder))
        layers = getattr(decoder, "layers", None)
        if isinstance(layers, nn.ModuleList) and hasattr(decoder, "embed_tokens"):
            return decoder, layers
        decoder = _first(decoder, ("language_model", "text_model", "model", "decoder"))
    raise UnsupportedModelError(
        f"No decoder layers found in {type(model).__name__}: expected a text model with `layers` and `embed_tokens` "
        "behind get_decoder(). Encoder-decoder models cannot be cut at a layer."
    )


def _token_id(config: Any, modality: str) -> int | None:
    values = (getattr(config, f"{modality}_token_{suffix}", None) for suffix in ("id", "index"))
    return next((value for value in values if isinstance(value, int)), None)


def _at_path(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _placeholder_ids(config: Any, row: FamilyRow) -> dict[str, int]:
    ids = {modality: int(_at_path(config, path)) for modality, path in row.id_paths}
    for modality in row.modalities:
        if modality in ids:
            continue
        if modality == "video" and row.shared_id:
            ids[modality] = ids["image"]
            continue
        found = _token_id(config, modality)
        if found is not None:
            ids[modality] = found
    if not ids:
        raise UnsupportedModelError(
            f"The config of '{row.model_type}' names no placeholder id ({', '.join(row.modalities)}_token_id)."
        )
    return ids
