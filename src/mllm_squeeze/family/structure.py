"""The one adapter: finds decoder, tower, projector and placeholder ids by looking at the model and its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.errors import UnsupportedModelError, did_you_mean
from mllm_squeeze.family.handlers.cross_attention import has_cross_attention
from mllm_squeeze.family.refused import REASONS
from mllm_squeeze.family.table import TABLE, FamilyRow
from mllm_squeeze.upstream import configs, contract, functions, layer_kinds, modules, pooling_head, rope
from mllm_squeeze.upstream.layer_kinds import LayerKind
from mllm_squeeze.upstream.modules import attention_of as find_attention
from mllm_squeeze.upstream.modules import is_causal
from mllm_squeeze.upstream.modules import pre_norm_of as find_pre_norm
from mllm_squeeze.upstream.structure import check_structure

__all__ = ["ModelParts", "find_attention", "find_parts", "find_pre_norm", "has_cross_attention", "is_causal"]


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model that the engine hooks.

    model: the HuggingFace model (a PEFT wrapper is looked through). base: the inner model that scatters the features.
    decoder: the text model; layers: its decoder layers. tower, blocks, projector: of the first encoder, None without
    one. ids: placeholder token id of each modality. row: the family's row. read_on: a second model reads the states of
    all layers, at full length.
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
    read_on: bool = False

    @property
    def config(self) -> Any:
        """Config of the whole model."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """Config of the text model."""
        return self.decoder.config

    @cached_property
    def position_axes(self) -> int:
        """How many axes positions have: 1, or several (M-RoPE)."""
        return rope.axes_of(self.text_config, self.base)

    @property
    def mrope(self) -> bool:
        """True where positions have several axes."""
        return self.position_axes > 1

    @cached_property
    def rotary(self) -> nn.Module | None:
        """Rotary embedding of the text model, None where positions are learned."""
        return rope.rotary_of(self.decoder)

    def rope_kind(self, layer: int) -> str | None:
        """Name of the rotary tables of a layer, None where all layers share one pair."""
        return None if self._rope_kinds is None else self._rope_kinds[layer]

    @cached_property
    def _rope_kinds(self) -> list[str] | None:
        return rope.rope_kinds(self.decoder)

    def rotate(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """Return the rotary tables of a layer at positions (B, T), as the text model makes them; hidden: (B, T, D)."""
        return rope.rotate(self.decoder, self.rope_kind(layer), hidden, positions)

    @cached_property
    def cross_attention(self) -> bool:
        """True where pictures are no part of the text model's sequence, and the text attends to them."""
        return bool(self.row.encoded) or has_cross_attention(self.decoder)

    @property
    def queries(self) -> nn.Module | None:
        """Q-Former whose queries attend to the image features, None without one."""
        return modules.queries_of(self.base)

    @property
    def probe_head(self) -> nn.Module | None:
        """Head of the tower that pools its patches by the attention of a learned query, None without one."""
        return None if self.tower is None else pooling_head.head_of(self.tower)

    @property
    def sound_tower(self) -> nn.Module | None:
        """Encoder of sound, None without one."""
        return modules.sound_tower_of(self.base)

    @property
    def sound_block(self) -> nn.Module | None:
        """Last block of the encoder of sound, None without one."""
        blocks = modules.blocks_of(self.sound_tower)
        return None if blocks is None else blocks[-1]

    @property
    def embedder(self) -> nn.Module | None:
        """Module inside the text model that encodes pictures, None where a feature method of the inner model does."""
        return modules.embedder_of(self.base)

    @property
    def final_norm(self) -> nn.Module | None:
        """Norm behind the last decoder layer."""
        return modules.final_norm_of(self.decoder)

    @cached_property
    def has_cls(self) -> bool:
        """True where the tower has a CLS token beside its patches."""
        # LLaVA takes CLIP (CLS) or SigLIP (none).
        return self.row.cls and self.tower is not None and modules.has_class_token(self.tower)

    @property
    def special_tokens(self) -> int:
        """Special tokens in front of the patches inside the tower: 1 with a CLS token there, else 0."""
        return int(self.has_cls and not self.row.cls_last)

    @property
    def cls_place(self) -> int:
        """Index of the CLS token in the tower's sequence, counted from the end where it stands there."""
        return -1 if self.row.cls_last else 0

    def patches(self, values: Tensor) -> Tensor:
        """Return what belongs to the patches of a tower's sequence; values: (tiles, special + N, ...)."""
        behind = int(self.has_cls) - self.special_tokens
        return values[:, self.special_tokens : values.shape[1] - behind]

    @property
    def saliency_block(self) -> int | None:
        """Number of the encoder block whose attention says what the encoder looks at, None without blocks."""
        if self.blocks is None or self.tower is None:
            return None
        config = self.tower.config
        named = self.row.saliency
        full = configs.full_blocks(config, named) if named else configs.blocks_beside_windows(config)
        if full:
            return full[-1]
        return self.feature_block if self.has_cls else max(len(self.blocks) - 2, 0)

    @property
    def feature_layers(self) -> int | list[int]:
        """Which hidden states of the encoder the LLM gets: an index into them, or several whose features are joined."""
        return configs.feature_layers(self.config)

    @property
    def feature_block(self) -> int | None:
        """Number of the encoder block whose output the LLM gets, None without blocks."""
        if self.blocks is None:
            return None
        layer = self.feature_layers
        layer = layer if isinstance(layer, int) else layer[0]
        return len(self.blocks) + layer if layer < 0 else layer - 1

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """The modules whose calls our hooks follow."""
        return self.model, self.base, self.decoder

    @cached_property
    def kv_sources(self) -> dict[int, int]:
        """For each layer that borrows keys and values, the layer it borrows them from: the last own one of its type."""
        return configs.kv_sources(self.text_config, len(self.layers))

    def window(self, layer: int) -> int | None:
        """Tokens that a layer looks back, None where it sees all."""
        return self._windows[layer]

    @cached_property
    def _windows(self) -> list[int | None]:
        return layer_kinds.windows(self.text_config, self.kinds)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each decoder layer is."""
        # Configs look attributes up slowly, and each decode step asks for every layer.
        return layer_kinds.layer_kinds(self.text_config, len(self.layers))

    def is_causal(self, layer: int) -> bool:
        """True where a layer without a mask closes later tokens."""
        return self._causal[layer]

    @cached_property
    def _causal(self) -> list[bool]:
        return [is_causal(find_attention(layer)) for layer in self.layers]

    def has_entries(self, layer: int) -> bool:
        """True where a layer keeps token by token, False for linear attention and convolutions."""
        return self.kinds[layer].meaning != "recurrent"

    def path(self, module: nn.Module | None) -> str | None:
        """Return the dotted name of a part, None where it is not there."""
        return next((name for name, found in self.model.named_modules() if found is module), None)


def find_parts(model: nn.Module, table: Mapping[str, FamilyRow] | None = None) -> ModelParts:
    """Find the parts of a model; a family that is not in the table is taken as its structure tells, unverified.

    Raises:
        UnsupportedModelError: not a HuggingFace model, no visual input, an unknown family, no decoder layers, layers of
            a kind that cannot be cut, or a structure that is not what this family had on the releases that were tested.
    """
    inner = modules.unwrap(model)
    config = getattr(inner, "config", None)
    model_type = configs.model_type_of(config)
    if model_type is None:
        raise UnsupportedModelError(
            f"Got a {type(model).__name__} without a HuggingFace config. Pass a model loaded with transformers, for "
            "example AutoModelForImageTextToText.from_pretrained(...)."
        )
    row = _row_of(inner, model_type, TABLE if table is None else table)
    base = modules.base_of(inner)
    decoder, layers = modules.reading_decoder_of(base) if row.encoded else modules.decoder_of(inner)
    tower = modules.tower_of(base)
    parts = ModelParts(
        model=inner,
        base=base,
        decoder=decoder,
        layers=layers,
        row=row,
        ids=_placeholder_ids(config, row),
        tower=tower,
        blocks=modules.blocks_of(tower),
        projector=modules.projector_of(base),
        read_on=modules.is_read_on(model),
    )
    _require_known(parts)
    return parts


def _require_known(parts: ModelParts) -> None:
    """Check what is read off a model when it is used, so that nothing of it is refused only in the middle of a call."""
    parts.window(0)
    row = parts.row
    if row.encoded:
        return  # nothing of it is read but what its decoder is called with
    # What a family has that nobody has tried is found out on its first call.
    encoded = () if row.by_runs or not row.verified else tuple(m for m in row.modalities if m != "audio")
    named = row.modalities if row.verified and not row.id_paths and not row.shared_id else ()
    broken = check_structure(parts, encoded=encoded, named=named, tried=row.verified)
    if row.verified and "anyres" in (row.grid, row.tower_to_llm):
        broken += functions.check_tiles(parts.base)
    contract.require(broken)


def _row_of(model: nn.Module, model_type: str, table: Mapping[str, FamilyRow]) -> FamilyRow:
    """Return the row of a family; one with several towers has a row per tower."""
    config: Any = model.config
    row = table.get(f"{model_type}+{configs.tower_type_of(config)}") or table.get(model_type)
    if row is not None:
        return row
    if model_type in REASONS:
        raise UnsupportedModelError(
            f"'{model_type}' ({type(model).__name__}) cannot be squeezed: {REASONS[model_type]}. The model was left as "
            "it was."
        )
    modalities = tuple(m for m in ("image", "video", "audio") if configs.placeholder_id(config, m) is not None)
    if modalities:
        return FamilyRow(model_type, modalities, grid="unknown", verified=False)
    raise UnsupportedModelError(
        f"'{model_type}' ({type(model).__name__}) is no multimodal family that is known, and its config names no "
        f"placeholder for images, videos or audio. {did_you_mean(model_type, table)} A text-only model has no visual "
        "tokens to squeeze."
    )


def _placeholder_ids(config: Any, row: FamilyRow) -> dict[str, int]:
    ids = {modality: int(configs.at_path(config, path)) for modality, path in row.id_paths}
    for modality in row.modalities:
        if modality in ids:
            continue
        if modality == "video" and row.shared_id:
            ids[modality] = ids["image"]
            continue
        found = configs.placeholder_id(config, modality)
        if found is not None:
            ids[modality] = found
    if not ids and row.encoded not in ("all", "behind"):
        raise UnsupportedModelError(
            f"The config of '{row.model_type}' names no placeholder id ({', '.join(row.modalities)}_token_id)."
        )
    return ids
