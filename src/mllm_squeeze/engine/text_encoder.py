"""A space that words and pictures share, which the user gives; and the words of a prompt in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mllm_squeeze.errors import ConfigError, SqueezeWarning
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream import shared_space


class SharedSpace(Protocol):
    """What puts words and patches into one space; any object with these two methods may be a text encoder.

    For rules that read words one by one it has two more: `tokens(words)` gives (B, M, D), zeros behind the last token
    of a text, and `patches(states)` what `image` gives by a linear map.
    One more, `picture`, gives the vectors (tiles, D) of whole pictures, of the same states as `image`. Methods that
    compare frames with the words ask for it where the vision tower has no CLS token.
    """

    def text(self, words: Sequence[str]) -> Tensor:
        """Return one vector for each text, (B, D)."""

    def image(self, states: Tensor) -> Tensor:
        """Return the vectors (tiles, N, D) of patches, of the states (tiles, N, C) that the LLM's vision tower gives.

        These are the states behind the block whose output the LLM gets, without a CLS token; a tower that packs the
        patches of all pictures into one row gives one tile.
        """


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The text model that belongs to the vision tower of a model, as `apply(..., text_encoder=)` takes it.

    encoder: a CLIPModel or SiglipModel; a pair (text model, picture model), both with projection; the folder or hub id
        of such a model; or an object of your own with `text` and `image` (see `SharedSpace`).
    tokenizer: tokenizer or processor of the language model, which turns the ids of a prompt into words again. None for
        the one that lies on this machine where the model was loaded from.
    own_tokenizer: tokenizer or processor of the encoder; None for the one that lies where the encoder was loaded from.
        An encoder of your own gets words and needs none.
    question: takes what is compared out of the whole prompt, which it gets as one string with its special tokens and
        without the placeholders of pictures. None compares the words behind the first visual token, without special
        tokens.
    """

    encoder: Any
    tokenizer: Any = None
    own_tokenizer: Any = None
    question: Callable[[str], str] | None = None


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """A text encoder at work on one model.

    space: what it computes with. tokenizer: of the language model. question: as of `TextEncoder`.
    """

    space: SharedSpace
    tokenizer: Any
    question: Callable[[str], str] | None = None

    @property
    def image_width(self) -> int | None:
        """Channels of the states that it takes, None where it does not tell."""
        return getattr(self.space, "image_width", None)

    @property
    def tells_tokens(self) -> bool:
        """True where it gives the tokens of a text one by one, and a linear map of patches."""
        known = getattr(self.space, "linear", True)
        return bool(known) and all(callable(getattr(self.space, name, None)) for name in ("tokens", "patches"))

    def words(self, ids: Tensor, layout: TokenLayout) -> list[str]:
        """Return the text of each row of a prompt that is compared; "" of a row without pictures.

        ids: int64 (B, T) on the CPU.
        """
        kept = layout.prompt & ~layout.visual
        first = torch.tensor(layout.first_visual)[:, None]
        if self.question is None:
            kept = kept & (torch.arange(layout.length) > first)
        texts = []
        for row, mask, start in zip(ids, kept, layout.first_visual, strict=True):
            there = [] if start == layout.length else row[mask].tolist()
            text = shared_space.decoded(self.tokenizer, there, special=self.question is not None) if there else ""
            texts.append((text if self.question is None or not text else self.question(text)).strip())
        return texts

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return (B, 1, D), float32: one vector for each text, zeros for a text without words.

        Raises:
            ConfigError: the encoder gives something else.
        """
        # Rows that generate() repeated for its beams hold the same words.
        different = list(dict.fromkeys(texts))
        vectors: Any = self.space.text(different)
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(different):
            raise ConfigError(
                f"{type(self.space).__name__}.text gives one vector for each text, a tensor ({len(different)}, D); got "
                f"{_told(vectors)}."
            )
        vectors = vectors.float()
        empty = torch.tensor([not text for text in different], device=vectors.device)
        vectors = vectors.masked_fill(empty[:, None], 0)
        rows = torch.tensor([different.index(text) for text in texts], device=vectors.device)
        return vectors[rows][:, None]

    def encode_each(self, texts: Sequence[str]) -> Tensor:
        """Return (B, M, D), float32: a vector for each token of each text, zeros behind the last.

        Raises:
            ConfigError: the encoder gives something else.
        """
        different = list(dict.fromkeys(texts))
        space: Any = self.space
        vectors: Any = space.tokens(different)
        if not isinstance(vectors, Tensor) or vectors.ndim != 3 or len(vectors) != len(different):
            raise ConfigError(
                f"{type(space).__name__}.tokens gives a vector for each token of each text, a tensor "
                f"({len(different)}, M, D); got {_told(vectors)}."
            )
        empty = torch.tensor([not text for text in different], device=vectors.device)
        rows = torch.tensor([different.index(text) for text in texts], device=vectors.device)
        return vectors.float().masked_fill(empty[:, None, None], 0)[rows]

    @property
    def pooling_model(self) -> nn.Module | None:
        """The picture model whose head pools patches by the attention of a learned query, None without one."""
        return getattr(self.space, "pooling_model", None)

    @property
    def pools(self) -> bool:
        """True where it gives a vector of a whole picture, of its patches."""
        return bool(getattr(self.space, "pools", callable(getattr(self.space, "picture", None))))

    def pooled(self, states: Tensor) -> Tensor:
        """Return the vectors (tiles, D) of whole pictures, of patch states (tiles, N, C).

        Raises:
            ConfigError: the encoder gives something else.
        """
        vectors: Any = getattr(self.space, "picture")(states)  # noqa: B009  a method that a space may have
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(states):
            raise ConfigError(
                f"{type(self.space).__name__}.picture gives one vector for each picture, a tensor ({len(states)}, D); "
                f"got {_told(vectors)}."
            )
        return vectors

    def project(self, states: Tensor, raw: bool = False) -> Tensor:
        """Return the vectors (tiles, N, D) of patch states (tiles, N, C); raw: by the projection alone.

        Raises:
            ConfigError: the encoder takes other states, or gives something else.
        """
        if self.image_width not in (None, states.shape[-1]):
            raise ConfigError(f"The text encoder takes patches of {self.image_width} channels, not {states.shape[-1]}.")
        space: Any = self.space
        vectors: Any = space.patches(states) if raw else space.image(states)
        if not isinstance(vectors, Tensor) or vectors.ndim != 3 or vectors.shape[:2] != states.shape[:2]:
            raise ConfigError(
                f"{type(space).__name__}.{'patches' if raw else 'image'} gives one vector for each patch, a tensor "
                f"({states.shape[0]}, {states.shape[1]}, D); got {_told(vectors)}."
            )
        return vectors


def bind(given: Any, parts: ModelParts) -> PromptEncoder:
    """Return what `text_encoder=` gives, loaded and ready for one model.

    given: a `TextEncoder`, or what its `encoder` may be.

    Raises:
        ConfigError: it is none of these. UnsupportedModelError: it, or a tokenizer, cannot be loaded.
    """
    asked = given if isinstance(given, TextEncoder) else TextEncoder(given)
    if asked.question is not None and not callable(asked.question):
        raise ConfigError(f"TextEncoder(question=...) is a function of the prompt; got {asked.question!r}.")
    tokenizer = asked.tokenizer
    if tokenizer is None:
        tokenizer = shared_space.tokenizer_beside(parts.model)
    if tokenizer is None:
        raise ConfigError(
            "text_encoder needs the words of the prompt, and no tokenizer of this model lies on this machine where it "
            f"was loaded from ({getattr(parts.config, '_name_or_path', '') or 'nowhere'}). Give it: "
            "text_encoder=squeeze.TextEncoder(encoder, tokenizer=processor)."
        )
    space = _space(asked, parts)
    _warn_other(space, parts)
    return PromptEncoder(space, shared_space.tokenizer_in(tokenizer), asked.question)


def _space(asked: TextEncoder, parts: ModelParts) -> SharedSpace:
    encoder = asked.encoder
    if callable(getattr(encoder, "text", None)) and callable(getattr(encoder, "image", None)):
        own: SharedSpace = encoder
        return own
    if isinstance(encoder, (str, Path)):
        device, dtype = shared_space.place_of(parts.model if parts.tower is None else parts.tower)
        encoder, tokenizer = _loaded(str(encoder), asked.own_tokenizer, device, dtype)
        return shared_space.PairedSpace(encoder, encoder, tokenizer)
    words, pictures = encoder if isinstance(encoder, tuple) and len(encoder) == 2 else (encoder, encoder)
    if not isinstance(words, nn.Module) or not isinstance(pictures, nn.Module):
        raise ConfigError(
            f"text_encoder is a CLIP or SigLIP model, its folder or hub id, a pair of its two sides, or an object with "
            f"text(words) and image(states); got {_told(encoder)}."
        )
    tokenizer = asked.own_tokenizer
    if tokenizer is None:
        tokenizer = shared_space.tokenizer_beside(words)
    if tokenizer is None:
        raise ConfigError(
            f"The tokenizer of the text encoder ({type(words).__name__}) does not lie on this machine where the "
            "encoder was loaded from. Give it: squeeze.TextEncoder(encoder, own_tokenizer=...)."
        )
    return shared_space.PairedSpace(words, pictures, shared_space.tokenizer_in(tokenizer))


def _warn_other(space: SharedSpace, parts: ModelParts) -> None:
    if parts.tower is None or not isinstance(space, shared_space.PairedSpace):
        return
    if space.is_of(parts.tower) is False:
        warnings.warn(
            f"The vision tower of '{parts.row.model_type}' has other weights than the picture side of the text "
            "encoder: it was tuned since, or comes from another checkpoint. Words and pictures are comparable only as "
            "far as the two agree.",
            SqueezeWarning,
            stacklevel=2,
        )


def _loaded(name: str, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    found = shared_space.load_tokenizer(name) if tokenizer is None else tokenizer
    return shared_space.load_pair(name, device, dtype), shared_space.tokenizer_in(found)


def _told(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
