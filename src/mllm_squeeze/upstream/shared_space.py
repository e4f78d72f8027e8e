"""Models that put words and pictures into one space (CLIP, SigLIP): their text, and their projection of patches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from mllm_squeeze.errors import ConfigError, SqueezeWarning, UnsupportedModelError
from mllm_squeeze.upstream.modules import first_of
from mllm_squeeze.upstream.pooling_head import head_of

_NORMS = ("vision_model.post_layernorm", "post_layernorm")
_FIRST_WEIGHTS = ("vision_model.embeddings.patch_embedding", "embeddings.patch_embedding")
_LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError)


class PairedSpace:
    """The space of a model with a text tower and a picture tower that were trained together.

    words: the model of the text. pictures: the model that has the picture side, often the same. tokenizer: of the text.

    Raises:
        UnsupportedModelError: one side has no projection that is known, or no weights.
    """

    def __init__(self, words: nn.Module, pictures: nn.Module, tokenizer: Any) -> None:
        self._words, self._pictures, self._tokenizer = words, pictures, tokenizer
        self._norm: Any = first_of(pictures, _NORMS)
        self._projection: Any = first_of(pictures, ("visual_projection",))
        self._text_tower: Any = first_of(words, ("text_model",))
        self._text_projection: Any = first_of(words, ("text_projection",))
        self._head: Any = None if self._projection is not None else head_of(pictures)
        has_text = callable(getattr(words, "get_text_features", None)) or first_of(words, ("text_projection",))
        if not has_text or self._norm is None or (self._projection is None and self._head is None):
            raise UnsupportedModelError(
                f"The text encoder ({type(words).__name__}, {type(pictures).__name__}) does not put words and pictures "
                "into one space in a way that is known. Give a CLIPModel, a SiglipModel, a pair of "
                "CLIPTextModelWithProjection and CLIPVisionModelWithProjection, or an object with text(words) and "
                "image(states) of its own."
            )
        if self._norm.weight.is_meta:
            raise UnsupportedModelError(
                f"The weights of the text encoder ({type(pictures).__name__}) are not there: it is on the meta device, "
                "or offloaded. Load it on a device."
            )
        self._warned = False

    @property
    def image_width(self) -> int:
        """Channels C of the patch states that `image` takes."""
        return int(self._norm.weight.shape[0])

    def is_of(self, tower: nn.Module) -> bool | None:
        """True where a vision tower has the weights of the picture side; None where that cannot be told."""
        mine, given = (getattr(first_of(one, _FIRST_WEIGHTS), "weight", None) for one in (self._pictures, tower))
        if mine is None or given is None or mine.is_meta or given.is_meta:
            return None
        # One of them may have been rounded to fewer bits.
        return mine.shape == given.shape and torch.allclose(
            mine.float().cpu(), given.float().cpu(), rtol=1e-2, atol=1e-6
        )

    def text(self, words: Sequence[str]) -> Tensor:
        """Return the pooled vectors (B, D) of texts, float32; what is longer than the text tower takes is cut off."""
        # Some text towers pool the last place, padding included, so each text gets all places, as in training.
        inputs = self._inputs(words, "max_length")
        get_features: Any = getattr(self._words, "get_text_features", None)
        output = self._words(**inputs).text_embeds if get_features is None else get_features(**inputs)
        pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return pooled.float()

    @property
    def linear(self) -> bool:
        """True where both sides end in a projection, so that single tokens and patches can be projected."""
        return self._projection is not None and None not in (self._text_projection, self._text_tower)

    def tokens(self, words: Sequence[str]) -> Tensor:
        """Return the projected states (B, M, D) of all tokens of texts, float32, zeros behind the last of a text."""
        inputs = self._inputs(words, "longest")
        tower: Any = self._text_tower
        states = tower(**inputs).last_hidden_state
        there = inputs.get("attention_mask", torch.ones(states.shape[:2], device=states.device)).bool()
        return _in_float32(self._text_projection, states).masked_fill(~there[..., None], 0)

    def patches(self, states: Tensor) -> Tensor:
        """Return the projections (tiles, N, D) of patch states (tiles, N, C), float32, without the norm in front."""
        return _in_float32(self._projection, states)

    def image(self, states: Tensor) -> Tensor:
        """Return the vectors (tiles, N, D) of patch states (tiles, N, C), float32.

        A patch is projected as the CLS token is. Where a head pools all patches by attention, each patch is what that
        head gives for it alone.
        """
        normed = _in_float32(self._norm, states)
        if self._projection is not None:
            return _in_float32(self._projection, normed)
        flat = normed.flatten(0, 1)[:, None].to(self._head.probe.dtype)
        pooled: Tensor = self._head(flat)
        return pooled.float().unflatten(0, states.shape[:2])

    @property
    def pooling_model(self) -> nn.Module | None:
        """The picture model, where a head of it pools all patches of a picture."""
        return None if self._head is None else self._pictures

    @property
    def pools(self) -> bool:
        """True where a head pools all patches of a picture."""
        return self._head is not None

    def picture(self, states: Tensor) -> Tensor:
        """Return the vectors (tiles, D) of whole pictures, float32: what the head gives for all patches (tiles, N, C).

        The last norm comes in between, as for the head.
        """
        pooled: Tensor = self._head(_in_float32(self._norm, states).to(self._head.probe.dtype))
        return pooled.float()

    def _inputs(self, words: Sequence[str], padding: str) -> dict[str, Tensor]:
        config: Any = self._words.config
        limit = int(getattr(config, "text_config", config).max_position_embeddings)
        self._warn_long(words, limit)
        given = self._tokenizer(list(words), padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        device = next(self._words.parameters()).device
        return {name: given[name].to(device) for name in ("input_ids", "attention_mask") if name in given}

    def _warn_long(self, words: Sequence[str], limit: int) -> None:
        if self._warned:
            return
        most = max((len(ids) for ids in self._tokenizer(list(words), verbose=False)["input_ids"]), default=0)
        if most > limit:
            self._warned = True
            warnings.warn(
                f"The text encoder takes {limit} tokens of a prompt, and this one has {most}; the rest is not "
                "compared. TextEncoder(question=...) takes the question out of a longer prompt.",
                SqueezeWarning,
                stacklevel=2,
            )


def load_pair(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a model of two towers for inference, from a folder or a hub id.

    Raises:
        UnsupportedModelError: it cannot be loaded.
    """
    try:
        found: nn.Module = AutoModel.from_pretrained(name, dtype=dtype).to(device).eval()
    except _LOADING as error:
        raise UnsupportedModelError(
            f"text_encoder='{name}' cannot be loaded: {_first_line(error)} Give the folder or the hub id of a CLIP or "
            "SigLIP model, or the model itself."
        ) from error
    return found


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder or a hub id.

    Raises:
        UnsupportedModelError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except _LOADING as error:
        raise UnsupportedModelError(
            f"text_encoder='{name}' cannot be loaded, it has no tokenizer: {_first_line(error)} Give the folder or the "
            "hub id of a CLIP or SigLIP model, or its tokenizer as well (TextEncoder(own_tokenizer=...))."
        ) from error


def tokenizer_beside(model: nn.Module) -> Any:
    """Return the tokenizer that lies on this machine where a model was loaded from, None where there is none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except _LOADING:
        return None


def tokenizer_in(given: Any) -> Any:
    """Return the tokenizer in a processor, or the tokenizer itself.

    Raises:
        ConfigError: it is none.
    """
    found = getattr(given, "tokenizer", given)
    if not callable(getattr(found, "decode", None)):
        raise ConfigError(f"A tokenizer, or a processor that has one, is wanted; got a {type(given).__name__}.")
    return found


def decoded(tokenizer: Any, ids: list[int], special: bool) -> str:
    """Return the text of ids; special: with the special tokens of the prompt."""
    return str(tokenizer.decode(ids, skip_special_tokens=not special))


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a model's first weights that are floating point."""
    weight = next(weight for weight in model.parameters() if weight.is_floating_point())
    return weight.device, weight.dtype


def state_width(block: nn.Module) -> int | None:
    """Return the channels of the states that a block of an encoder gets, by its norm; None where none is found."""
    weights = (getattr(child, "weight", None) for child in block.children())
    return next((len(weight) for weight in weights if isinstance(weight, Tensor) and weight.ndim == 1), None)


def _in_float32(module: Any, states: Tensor) -> Tensor:
    """Run a norm or a projection in float32, as papers that project patches do, whatever its weights are."""
    states = states.to(module.weight.device)
    bias = None if module.bias is None else module.bias.float()
    if type(module) is nn.LayerNorm:
        return functional.layer_norm(states.float(), module.normalized_shape, module.weight.float(), bias, module.eps)
    if type(module) is nn.Linear:
        return functional.linear(states.float(), module.weight.float(), bias)
    found: Tensor = module(states)
    return found.float()


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith((".", "?", "!")) else f"{line}."
