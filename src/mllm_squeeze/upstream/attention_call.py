"""One call of an attention function, its arguments read by role; an argument that nobody has looked at is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.upstream.versions import how_to_go_on

_TENSORS = ("query", "key", "value", "attention_mask")

# Keywords that change no score. The first line comes from attention modules, the others pass through from the model's
# caller: what the loss and the output are made of, and what was said about the pictures.
# fmt: off
_NEUTRAL = frozenset((
    "dropout", "position_ids", "deterministic", "use_cache", "cache_position", "max_length_q", "max_length_k",
    "num_items_in_batch", "labels", "return_loss", "logits_to_keep", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits",
    "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "image_sizes", "image_sizes_videos",
    "target_sizes", "target_sizes_videos",
    "image_grid_thw", "video_grid_thw", "grid_thw", "image_merge_sizes", "video_merge_sizes", "merge_sizes",
    "image_position_ids",
    "video_position_ids", "pixel_position_ids", "spatial_shapes", "pixel_attention_mask", "pixel_mask",
    "num_local_patches",
    "vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy", "vision_aspect_ratio",
    "batch_num_images",
    "images_per_sample", "num_frames_per_video", "second_per_grid_ts", "video_second_per_grid", "use_audio_in_video",
    "audio_feature_lengths", "feature_attention_mask", "input_features_mask", "interpolate_pos_encoding",
    "downsample_mode",
))
# fmt: on

# Keywords that change scores in a way that is not taken into account.
_CHANGES_SCORES = {
    "position_bias": "a bias by position",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "cu_seq_lens_q": "packed rows",
    "cu_seq_lens_k": "packed rows",
    "seq_idx": "packed rows",
}


@dataclass(frozen=True)
class AttentionCall:
    """What an attention function is called with.

    module: the attention module. query: (B, H, M, d), key and value: (B, Hkv, P, d), after rotary embedding and cache.
    mask: in any of the forms of `masks.form`. scaling, softcap, is_causal, window: None where they were not given.
    others: all other keywords.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float | None = None
    softcap: float | None = None
    is_causal: bool | None = None
    window: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
        """Read the arguments of an attention function behind the module.

        Raises:
            UnsupportedModelError: query, key, value and mask cannot be told.
        """
        rest = dict(kwargs)
        given = [*args, *(rest.pop(name) for name in _TENSORS[len(args) :] if name in rest)]
        if len(given) != len(_TENSORS) or not all(isinstance(tensor, Tensor) for tensor in given[:3]):
            raise UnsupportedModelError(
                f"{type(module).__name__} calls its attention with {len(args)} positional arguments and "
                f"{sorted(kwargs)}; expected {', '.join(_TENSORS)}. Its attention cannot be read: use a method that "
                f"reads none. {how_to_go_on()}"
            )
        query, key, value, mask = given
        return cls(
            module,
            query,
            key,
            value,
            mask,
            scaling=rest.pop("scaling", None),
            softcap=rest.pop("softcap", None),
            is_causal=rest.pop("is_causal", None),
            window=rest.pop("sliding_window", None),
            others=rest,
        )

    def replace(self, **changes: Any) -> AttentionCall:
        """Return the call with other arguments."""
        return dataclasses.replace(self, **changes)

    def of_sample(self, number: int) -> AttentionCall:
        """Return the call of one row of the batch."""
        mask = self.mask
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = mask[number : number + 1]
        query, key, value = (states[number : number + 1] for states in (self.query, self.key, self.value))
        return self.replace(query=query, key=key, value=value, mask=mask)

    def behind(self, key: Tensor, value: Tensor) -> AttentionCall:
        """Return the call with keys and values (B, Hkv, n, d) of earlier passes in front of its own."""
        return self.replace(key=torch.cat([key, self.key], dim=2), value=torch.cat([value, self.value], dim=2))

    def filled(self, entries: int) -> AttentionCall:
        """Return the call without the empty slots that a cache of fixed size hands out behind so many entries."""
        return self.replace(key=self.key[:, :, :entries], value=self.value[:, :, :entries])

    def nothing(self) -> Tensor:
        """Return an output (B, M, H, d) of the attention function for a caller that does not look at it."""
        batch, heads, queries, _ = self.query.shape
        return self.value.new_zeros(batch, queries, heads, self.value.shape[-1])

    @property
    def logit_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.query.shape[-1] ** -0.5 if self.scaling is None else float(self.scaling)

    def require_plain_scores(self) -> None:
        """Check that the scores are softmax(scale * q @ k + mask), with a softcap at most.

        Raises:
            UnsupportedModelError: an argument changes them in another way, or nobody has looked at what it does.
        """
        for name, value in self.others.items():
            if value is None or name in _NEUTRAL:
                continue
            reason = _CHANGES_SCORES.get(name)
            raise self._refusal(
                f"calls its attention with '{name}' ({reason}), which the scores would leave out"
                if reason
                else f"calls its attention with '{name}', of which mllm_squeeze does not know whether it changes scores"
            )
        own = getattr(self.module, "scaling", None)
        if self.scaling is None and isinstance(own, float) and not math.isclose(own, self.logit_scale, rel_tol=1e-4):
            raise self._refusal(f"says scaling={own:.6g} and does not hand it to its attention")

    def _refusal(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.module).__name__} {what}. Use a method that reads no attention. If you passed this "
            f"argument to the model yourself, leave it out. {how_to_go_on()}"
        )
