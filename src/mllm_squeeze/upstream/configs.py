"""What the config of a HuggingFace model says, by the names that transformers gives its words."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mllm_squeeze.errors import UnsupportedModelError

_ID_SUFFIXES = ("id", "index")
_FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")
# Of which encoder layer each of several decoder layers gets features.
_FEATURES_BY_LAYER = "deepstack_layer_map"
# Where a part of the config names them: an index into hidden states, or numbers of blocks where it is not negative.
_INNER_FEATURE_LAYER = ("vision_config", "feature_layer")
_FEATURE_BLOCKS = ("adapter_config", "vision_feature_layer")


@dataclass(frozen=True)
class TextSizes:
    """The sizes of a text model that its FLOPs and the bytes of its cache follow from.

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


def model_type_of(config: Any) -> str | None:
    """Return the name that transformers gives the family, None where this is no HuggingFace config."""
    return getattr(config, "model_type", None)


def tower_type_of(config: Any) -> str | None:
    """Return the name of the vision encoder's family, None where the config does not say."""
    return getattr(getattr(config, "vision_config", None), "model_type", None)


def at_path(config: Any, path: str) -> Any:
    """Return what stands at a dotted path of a config."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def placeholder_id(config: Any, modality: str) -> int | None:
    """Return the id of the token that stands for one feature ("image", "video", "audio"), None without one."""
    values = (getattr(config, name, None) for name in placeholder_names(modality))
    return next((value for value in values if isinstance(value, int)), None)


def placeholder_names(modality: str) -> tuple[str, ...]:
    """Return the names under which a config keeps a modality's placeholder id."""
    return tuple(f"{modality}_token_{suffix}" for suffix in _ID_SUFFIXES)


def feature_layers(config: Any) -> int | list[int]:
    """Return which hidden states of the encoder the LLM gets: an index into them, or several that are joined."""
    by_layer: list[tuple[int, int]] | None = getattr(config, _FEATURES_BY_LAYER, None)
    if by_layer:
        return [there for _, there in sorted((layer, there) for there, layer in by_layer)]
    for name in _FEATURE_LAYERS:
        found: Any = getattr(config, name, None)
        if found is not None:
            return found
    inner: int | None = _inside(config, _INNER_FEATURE_LAYER)
    if inner is not None:
        return inner
    blocks: list[int] | None = _inside(config, _FEATURE_BLOCKS)
    return -1 if blocks is None else [block + 1 if block >= 0 else block for block in blocks]


def _inside(config: Any, path: tuple[str, str]) -> Any:
    return getattr(getattr(config, path[0], None), path[1], None)


def names_feature_layers(config: Any) -> bool:
    """Say whether a config has a word for the hidden states that the LLM gets."""
    return any(hasattr(config, name) for name in _FEATURE_LAYERS)


def blocks_beside_windows(config: Any) -> list[int]:
    """Return the encoder blocks that attend to the whole picture, [] unless its config says that others see windows.

    config: of the encoder.
    """
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    windowed = any("window" in kind or "sliding" in kind for kind in kinds)
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"] if windowed else []


def full_blocks(config: Any, name: str) -> list[int]:
    """Return the encoder blocks that attend to the whole picture.

    config: of the encoder. name: of the list in it.

    Raises:
        UnsupportedModelError: the config has no such list.
    """
    found: Any = getattr(config, name, None)
    if found is None:
        raise UnsupportedModelError(
            f"The config of the vision encoder ({getattr(config, 'model_type', type(config).__name__)}) does not say "
            f"which of its blocks attend to the whole picture: expected a list `{name}`, found none."
        )
    return [int(number) for number in found]


def kv_sources(config: Any, count: int) -> dict[int, int]:
    """Return for each layer that borrows keys and values the one it borrows them from: the last own one of its type.

    config: of the text model. count: number of its layers.
    """
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    own = count - shared
    last = {kind: number for number, kind in enumerate(kinds[:own])}
    return {number: last[kinds[number]] for number in range(own, count) if kinds[number] in last}


def temperature_start(config: Any) -> int | None:
    """Return from how many tokens on a text model scales attention by the place in the cache, None where it never does.

    config: of the text model.
    """
    start = getattr(config, "floor_scale", None)
    return int(start) if start and getattr(config, "attn_temperature_tuning", False) else None


def text_sizes(config: Any, layers: int) -> TextSizes | None:
    """Return the sizes of a text model of so many layers, None where its config does not name them.

    Of layers that differ, it is the first that counts.
    """
    config = of_layer(config, 0)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    inner = _intermediate(config)
    if heads is None or hidden is None or inner is None:
        return None
    return TextSizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=inner,
        vocab=config.vocab_size,
    )


def of_layer(config: Any, number: int) -> Any:
    """Return what a config says of a layer: one whose layers differ refuses to say what only one of them has."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config


def _intermediate(config: Any) -> int | None:
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None)
    if isinstance(experts, int) and isinstance(width, int):
        return experts * width + (getattr(config, "shared_expert_intermediate_size", None) or 0)
    found = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    return found if isinstance(found, int) else None


# The grid of an encoder


def patch_grid(config: Any) -> int:
    """Return how many patches a square picture has along one side; config: of the whole model."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size)


def patch_size(config: Any) -> int:
    """Return the side of a patch in pixels; config: of the whole model."""
    return int(config.vision_config.patch_size)


def tile_size(config: Any) -> int:
    """Return the side in pixels of what the encoder takes at once; config: of the whole model."""
    return int(config.vision_config.image_size)


def tower_merge(config: Any) -> int:
    """Return how many patches along one side the encoder's merger joins to one token, 1 without a merger."""
    return int(getattr(config.vision_config, "spatial_merge_size", 1))


def frame_merge(config: Any) -> int:
    """Return how many frames of a video the projector joins to one, 1 where it joins none."""
    return int(getattr(config.vision_config, "temporal_merge_size", 1))


def projector_merge(config: Any) -> int:
    """Return how many patches along one side the projector joins to one token, 1 where it joins none."""
    return int(getattr(config, "spatial_merge_size", 1))


def tile_downsample(config: Any) -> Fraction:
    """Return by how much the projector shortens each side of a tile, 1 where it does not."""
    rate = getattr(config, "downsample_rate", None)
    return Fraction(rate) if isinstance(rate, str) else Fraction(1)


def position_kernel(config: Any) -> int:
    """Return how many patches along one side the encoder pools by their positions."""
    return int(config.vision_config.pooling_kernel_size)


def crop_size(config: Any) -> int:
    """Return the side in pixels of a sub-image."""
    return int(config.vision_config.crop_size)


def pool_stride(config: Any) -> int:
    """Return by how much the frames of a video are pooled along one side."""
    return int(config.spatial_pool_stride)


def patches_of(config: Any) -> int | None:
    """Return how many patches a picture of the encoder's size has, None where that is not told; config: its own."""
    size, patch = (_sides(getattr(config, name, None)) for name in ("image_size", "patch_size"))
    return None if size is None or patch is None else (size[0] // patch[0]) * (size[1] // patch[1])


def _sides(size: Any) -> tuple[int, int] | None:
    """Return height and width of what may be one number for both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None
