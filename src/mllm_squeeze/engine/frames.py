"""What runs in a thread now: calls of the inner model, with their inputs and what the encoders gave for them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mllm_squeeze.engine.encode import EncodeCall
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.spans import Features, find_layout
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream.calls import TextCall
from mllm_squeeze.upstream.prompts import MODALITIES, PromptCall

T = TypeVar("T")


@dataclass
class Frame:
    """One call of the inner model, and the features that its encoders gave for it."""

    call: PromptCall
    features: dict[str, Features] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """One call of the whole model.

    wanted: trailing tokens that its logits are wanted of, None for all. encoded: what was recorded about the features
    that it brings, by modality; whatever rebuilds them on their way to the inner model loses that.
    """

    wanted: int | None
    encoded: Mapping[str, Features]


class _Live(dict[str, Any]):
    """Keyword arguments of a call; they live as long as the call does, however it ends."""


class Calls(Generic[T]):
    """What belongs to the calls of one module that run now, the innermost last.

    torch runs no hook behind a call that ends with Ctrl-C, so each entry also knows whether its call still lives.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[T, weakref.ref[_Live] | None]] = []

    def enter(self, value: T, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Add what belongs to a call; returns the arguments to go on with. Without any the caller must `leave`."""
        # Where one module has several parts to play, all entries live as long as its one call.
        live = kwargs if isinstance(kwargs, _Live) else _Live(kwargs or {})
        self._entries.append((value, None if kwargs is None else weakref.ref(live)))
        return live

    def replace(self, value: T) -> None:
        """Change what belongs to the innermost call."""
        self._entries[-1] = (value, self._entries[-1][1])

    def leave(self) -> T | None:
        """Take away what belongs to the innermost call."""
        return self._entries.pop()[0] if self._entries else None

    @property
    def top(self) -> T | None:
        """What belongs to the innermost call that lives, None where none does."""
        while self._entries:
            value, live = self._entries[-1]
            if live is None or live() is not None:
                return value
            self._entries.pop()
        return None


class Local(threading.local):
    """What runs in this thread now; threads that share a model do not meet."""

    def __init__(self) -> None:
        self.frames: Calls[Frame] = Calls()
        self.sessions: Calls[Session | None] = Calls()
        self.wholes: Calls[Whole] = Calls()
        self.encode: EncodeCall | None = None
        # The session of a self-check that runs now: the text model is called inside its own pre-hook.
        self.probe: tuple[Session | None] | None = None
        # Length of the prompt that generate() was called with, None outside of it.
        self.prompt: int | None = None

    @property
    def frame(self) -> Frame | None:
        """The innermost call of the inner model."""
        return self.frames.top

    @property
    def wanted(self) -> int | None:
        """Trailing tokens that the innermost call of the whole model is about, None for all."""
        return None if self.wholes.top is None else self.wholes.top.wanted

    @property
    def session(self) -> Session | None:
        """The session of the innermost decoder pass."""
        return self.sessions.top


def features_of(frame: Frame, ids: Mapping[str, int]) -> dict[str, Features]:
    """Return what was encoded for this pass; what is encoded without a feature method is told by its inputs."""
    found = {modality: features.without(frame.call.left(modality)) for modality, features in frame.features.items()}
    for modality in MODALITIES:
        if modality in ids and modality not in found and frame.call.brings(modality):
            found[modality] = Features(modality, None)
    return found


def layout_of(
    frame: Frame, features: Mapping[str, Features], parts: ModelParts, call: TextCall, past: int, prompt: int | None
) -> TokenLayout:
    """Return the layout of a pass.

    call: of the text model. past: tokens seen before. prompt: length of the prompt that generate() was called with,
    None outside of it; what lies behind it are guesses of assisted decoding.
    """
    width = call.width
    ids = _ids(parts, frame.call)
    real = real_tokens(frame.call.mask, past, width)
    ids = ids[:, -width:]
    # A generate() of its own expands its rows for beams behind our back.
    ids = ids.repeat_interleave(call.batch // ids.shape[0], dim=0)
    real = None if real is None else real.repeat_interleave(ids.shape[0] // real.shape[0], dim=0)
    drafts = 0 if prompt is None else max(past + width - prompt, 0)
    return find_layout(ids, real, features, parts.ids, parts.row.grouped, frame.call.token_types, drafts)


def words_behind_pictures(
    parts: ModelParts, call: TextCall, prompted: PromptCall, prompt: int | None
) -> tuple[Tensor, Tensor]:
    """Return the embeddings (B, T, D) of a prompt, and bool (B, T), its words behind the first picture.

    call: of the text model. prompted: of the inner model. prompt: as for `layout_of`.
    """
    embeddings = call.embeddings
    if embeddings is None:
        table: Any = parts.decoder
        embeddings = table.embed_tokens(call.ids)
    ids = call.ids if prompted.ids is None else prompted.ids
    if ids is None:
        ids = _ids_from_embeddings(parts, embeddings)
    width = embeddings.shape[1]
    picture = ids[:, -width:] == parts.ids["image"]
    mask = prompted.mask
    real = mask[:, -width:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(picture)
    if prompt is not None:
        real = real & (torch.arange(width, device=real.device) < prompt)
    behind = picture.cumsum(1) > 0
    return embeddings, (real & behind & ~picture).to(embeddings.device)


def warn_no_image() -> None:
    """Say that a prompt holds nothing that could be cut."""
    warnings.warn(
        "This prompt holds no image, video or audio that the handle saw being encoded; nothing was cut.",
        SqueezeWarning,
        stacklevel=2,
    )


def real_tokens(mask: Any, past: int, width: int) -> Tensor | None:
    """Return bool (B, T), False for padding; None where no token is said to be padding.

    mask: what the inner model got: 2-D (B, tokens seen), or 4-D (B, 1, T, K), as generate() makes them for caches that
    can be compiled. In a 4-D mask a real token sees itself.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        mask = mask[:, None].expand(-1, width, -1)
    else:
        mask = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    if mask.shape[-1] < past + width:
        past = mask.shape[-1] - width
    return mask[:, :, past : past + width].diagonal(dim1=1, dim2=2).bool()


def _ids(parts: ModelParts, call: PromptCall) -> Tensor:
    if call.ids is not None:
        return call.ids
    if call.embeddings is None:
        raise UnsupportedInputError(
            f"The prompt has neither ids nor embeddings that could be found; it came with "
            f"{', '.join(call.inputs) or 'nothing'}."
        )
    return _ids_from_embeddings(parts, call.embeddings)


def _ids_from_embeddings(parts: ModelParts, embeddings: Tensor) -> Tensor:
    """Return ids that tell placeholders from text, by their embedding, as the library itself does."""
    table: Any = parts.base
    ids = torch.full(embeddings.shape[:2], -1, dtype=torch.long, device=embeddings.device)
    for token in set(parts.ids.values()):
        vector = table.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
        ids = torch.where((embeddings == vector).all(-1), token, ids)
    return ids
