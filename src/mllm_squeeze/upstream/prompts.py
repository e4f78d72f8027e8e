"""What a model is prompted with: calls of generate(), of the whole model and of the inner one, read by role."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.upstream.calls import named
from mllm_squeeze.upstream.masks import widest
from mllm_squeeze.upstream.names import EMBEDDINGS, IDS, MASK

VIDEO_PIXELS = "pixel_values_videos"
# Arguments that bring a modality into a prompt.
_PIXELS = {
    "image": ("pixel_values", "image_pixel_values"),
    "video": (VIDEO_PIXELS,),
    "audio": ("input_features", "audio_input_features", "input_values"),
}
_ENCODED, _TOKEN_TYPES = "mm_encoder_outputs", "mm_token_type_ids"
# What encoders get that read no words.
_ENCODER_INPUTS = ("pixel_values", "flattened_patches")
# Names under which a forward collects what it has no name for.
_CATCH_ALL = ("kwargs", "generate_kwargs")


@dataclass(frozen=True)
class PromptCall:
    """One call of the model that scatters features into a prompt; inputs: its arguments by name."""

    inputs: Mapping[str, Any]

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PromptCall:
        """Read the call that a pre-hook sees."""
        return cls(named(module, args, kwargs) if args else kwargs)

    @property
    def ids(self) -> Tensor | None:
        """Ids (B, T), None where only embeddings are given."""
        return self.inputs.get(IDS)

    @property
    def embeddings(self) -> Tensor | None:
        """Embeddings (B, T, D), None where only ids are given."""
        return self.inputs.get(EMBEDDINGS)

    @property
    def mask(self) -> Any:
        """The attention mask; where there is one by kind of layer, that of the layers that see all."""
        mask = self.inputs.get(MASK)
        return widest(mask) if isinstance(mask, Mapping) else mask

    @property
    def token_types(self) -> Tensor | None:
        """Int (B, T): 1 for image tokens and 2 for those of videos; None where not given."""
        return self.inputs.get(_TOKEN_TYPES)

    @property
    def encoded(self) -> Mapping[str, Any]:
        """Outputs of feature methods that ran before the call, by modality."""
        return {m: output for m, output in (self.inputs.get(_ENCODED) or {}).items() if output is not None}

    def brings(self, modality: str) -> bool:
        """True where the call has pixels, sounds or features of a modality."""
        names = _PIXELS.get(modality, ())
        return any(self.inputs.get(name) is not None for name in names) or modality in self.encoded

    def left(self, modality: str) -> Tensor | None:
        """Bool (tokens of all items,), those that a family itself leaves in the prompt; None for all."""
        return self.inputs.get(f"{modality}_compression_mask")


MODALITIES = tuple(_PIXELS)


def wanted_tail(model: nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """Return how many trailing tokens a call of the whole model is about, None where it is about all of them."""
    config: Any = model.config
    keep = kwargs.get("logits_to_keep")
    states = kwargs.get("output_hidden_states")
    states = getattr(config, "output_hidden_states", False) if states is None else states
    if type(keep) is not int or keep < 1 or states or kwargs.get("labels") is not None:
        return None
    return keep


def flat(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a method by name, what it collects in a catch-all included."""
    given = inspect.signature(method).bind_partial(*args, **kwargs).arguments
    return {**{k: v for name in _CATCH_ALL for k, v in given.pop(name, {}).items()}, **given}


def vision_inputs(modality: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a feature method; one for videos may take them under the name of pictures."""
    inputs = dict(given)
    if modality == "video":
        inputs.setdefault(VIDEO_PIXELS, inputs.get("pixel_values"))
    return inputs


def patch_grids(modality: str, inputs: Mapping[str, Any], items: int) -> list[tuple[int, int, int]]:
    """Return frames, height and width in patches of each item that an encoder gets, as the inputs tell them.

    items: how many there are; what is told once for several frames is repeated.
    """
    grids = inputs.get(f"{modality}_grid_thw")
    if grids is not None:
        return [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    ends = {"image": "", "video": "_videos"}[modality]
    names = ("spatial_shapes", f"target_sizes{ends}")
    sizes = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if sizes is None:
        return []
    told = [(1, int(h), int(w)) for h, w in sizes.tolist()]
    return told * max(items // max(len(told), 1), 1)


def merge_sizes(modality: str, inputs: Mapping[str, Any]) -> list[int]:
    """Return how many patches along one side of each item become one token."""
    return [int(size) for size in inputs[f"{modality}_merge_sizes"]]


def patch_positions(modality: str, inputs: Mapping[str, Any]) -> Tensor:
    """Return the column and row of each patch, int64 (rows, P, 2); -1 for padding."""
    found: Tensor = inputs[f"{modality}_position_ids"]
    return found


def pooled_patches(modality: str, inputs: Mapping[str, Any]) -> Tensor:
    """Return the patches that each token pools, int64 (tokens, P), counted over all crops; -1 for none."""
    found: Tensor = inputs[f"{modality}_token_pooling"]
    return found


@dataclass(frozen=True)
class EmbedderCall:
    """One call of the module inside a text model that encodes pictures.

    ids: int64 (B, T). sizes: (height, width) in pixels of each picture. mask: bool (pictures, crops, h, w), which
    patches are no padding, None for all.
    """

    ids: Tensor
    sizes: list[tuple[int, int]]
    mask: Tensor | None

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> EmbedderCall:
        """Read the call that a hook sees."""
        given = named(module, args, kwargs)
        sizes = given["image_sizes"].view(-1, 2).tolist()
        return cls(given[IDS], [(int(h), int(w)) for h, w in sizes], given.get("image_attention_mask"))


@dataclass(frozen=True)
class GenerateCall:
    """One call of generate(); given: its arguments by name."""

    given: Mapping[str, Any]

    @property
    def prompt_length(self) -> int | None:
        """Length of the prompt, None where there is none."""
        prompt = self._prompt
        return None if prompt is None else int(prompt.shape[1])

    @property
    def rows(self) -> int | None:
        """Rows of the prompt, before they are repeated for beams; None where there is none."""
        prompt = self._prompt
        return None if prompt is None else int(prompt.shape[0])

    @property
    def encoded_rows(self) -> int | None:
        """Rows of what an encoder gets, before they are repeated for beams; None where it is not given."""
        prompt = self._first(("inputs", IDS, EMBEDDINGS, *_ENCODER_INPUTS))
        return None if prompt is None else int(prompt.shape[0])

    @property
    def ids(self) -> Tensor | None:
        """Ids (B, T), None where there are none."""
        found = self._first(("inputs", IDS))
        return found if found is not None and found.ndim == 2 else None

    @property
    def _prompt(self) -> Tensor | None:
        return self._first(("inputs", IDS, EMBEDDINGS))

    def _first(self, names: tuple[str, ...]) -> Tensor | None:
        candidates = [self.given.get(name) for name in names]
        return next((one for one in candidates if isinstance(one, Tensor) and one.ndim >= 2), None)

    def in_chunks(self, model: nn.Module) -> bool:
        """True where the prompt is prefilled in chunks."""
        config = self.given.get("generation_config") or getattr(model, "generation_config", None)
        return self.given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None
