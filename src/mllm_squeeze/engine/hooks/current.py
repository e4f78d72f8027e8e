"""What runs in a thread now: calls of the inner model, with their inputs and what the encoders gave for them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mllm_squeeze.engine.encoder.call import EncodeCall
from mllm_squeeze.engine.hooks.running import caller, is_running
from mllm_squeeze.engine.hooks.untraced import untraced
from mllm_squeeze.engine.sequence.session import Session
from mllm_squeeze.engine.tokens.spans import Features, find_layout
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream import masks
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


class Entry(Generic[T]):
    """What belongs to one call."""

    def __init__(self, value: T, frame: FrameType) -> None:
        self.value = value
        self._frame = frame

    def runs_in(self, frame: FrameType) -> bool:
        """True where this is the frame of the call."""
        return self._frame is frame

    @property
    def lives(self) -> bool:
        """True while the call runs in this thread."""
        return is_running(self._frame)


class Calls(Generic[T]):
    """What belongs to the calls of one module, or of one function of ours, that run now, the innermost last.

    torch runs no hook behind a call that ends with Ctrl-C, and Ctrl-C may come in front of any line of ours, so an
    entry counts as long as the frame of its call is on the stack.
    """

    def __init__(self) -> None:
        self._entries: list[Entry[T]] = []

    @untraced
    def enter(self, value: T, frame: FrameType | None = None) -> Entry[T]:
        """Add what belongs to a call: to the one that runs this hook, or to that of a frame."""
        self._drop_dead()
        self._entries.append(Entry(value, caller() if frame is None else frame))
        return self._entries[-1]

    @untraced
    def leave(self, entry: Entry[T] | None = None) -> T | None:
        """Take away an entry, or that of the call which runs this hook; None where there is none."""
        self._drop_dead()
        if not self._entries:
            return None
        last = self._entries[-1]
        mine = last.runs_in(caller()) if entry is None else last is entry
        return self._entries.pop().value if mine else None

    @property
    def top(self) -> T | None:
        """What belongs to the innermost call that runs, None where none does."""
        if not self._entries:
            return None
        # Layers ask in each decode step, which mostly needs nothing of us; whether its call runs makes no difference.
        if len(self._entries) == 1 and self._entries[0].value is None:
            return None
        return self._innermost()

    @untraced
    def _innermost(self) -> T | None:
        self._drop_dead()
        return self._entries[-1].value if self._entries else None

    def _drop_dead(self) -> None:
        while self._entries and not self._entries[-1].lives:
            self._entries.pop()


class Local(threading.local):
    """What runs in this thread now; threads that share a model do not meet."""

    def __init__(self) -> None:
        self.frames: Calls[Frame] = Calls()
        self.sessions: Calls[Session | None] = Calls()
        self.wholes: Calls[Whole] = Calls()
        self.encodings: Calls[EncodeCall] = Calls()
        # The session of a self-check that runs now: the text model is called inside its own pre-hook.
        self.probes: Calls[tuple[Session | None]] = Calls()
        # Length of the prompt that generate() was called with.
        self.prompts: Calls[int | None] = Calls()

    @property
    def encode(self) -> EncodeCall | None:
        """The outermost call of a feature method."""
        return self.encodings.top

    @property
    def probe(self) -> tuple[Session | None] | None:
        """The session that a self-check runs the text model with, None outside of one."""
        return self.probes.top

    @property
    def prompt(self) -> int | None:
        """Length of the prompt that generate() was called with, None outside of it."""
        return self.prompts.top

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
    # What cannot be read here is refused where it would have to be shortened.
    if masks.form(mask) not in ("keys", "square"):
        return None
    opened = masks.is_open(mask)
    opened = opened[:, None].expand(-1, width, -1) if opened.ndim == 2 else opened[:, 0]
    if opened.shape[-1] < past + width:
        past = opened.shape[-1] - width
    return opened[:, :, past : past + width].diagonal(dim1=1, dim2=2)


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
