"""Hooks on a text model that attends to its pictures: their keys get fewer before the first cross-attention layer."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from mllm_squeeze.engine import key_cache
from mllm_squeeze.engine.fittings import Fittings
from mllm_squeeze.engine.frames import Calls, Local, warn_no_image, words_behind_pictures
from mllm_squeeze.engine.keys import KeptKeys, all_keys, open_mask, reduce_keys, take_columns
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence import is_flash
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.trace import Attended
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.handlers.cross_attention import cross_layers, find_pictures
from mllm_squeeze.family.structure import ModelParts


@dataclass
class _Pass:
    """One call of the text model: what was reduced in it, and which keys its layers will then hold."""

    session: Session | None = None
    kept: KeptKeys | None = None
    reader: weakref.ref[Any] | None = None


class _Now(threading.local):
    def __init__(self) -> None:
        self.passes: Calls[_Pass] = Calls()


class CrossAttentionHooks:
    """Takes rows of the states that the text attends to, and in every later pass columns of the mask over them.

    enabled: says whether the handle is switched on now.
    """

    def __init__(
        self,
        parts: ModelParts,
        plan: Plan,
        local: Local,
        enabled: Callable[[], bool],
        publish: Callable[[Session], None],
    ) -> None:
        self.parts, self.plan = parts, plan
        self._local, self._enabled, self._publish = local, enabled, publish
        self._layers = cross_layers(parts.layers)
        self._now = _Now()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.plan.refuse_copy()

    def attach(self, fittings: Fittings) -> None:
        """Put the hooks on."""
        fittings.around(self.parts.decoder, self._enter, self._leave)
        for number in self._layers:
            fittings.before(self.parts.layers[number], functools.partial(self._before_layer, number))

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        now = _Pass()
        live = self._now.passes.enter(now, kwargs)
        now.reader = weakref.ref(live)
        cache = kwargs.get("past_key_values")
        kept = key_cache.open_keys(cache, live)
        if kwargs.get("cross_attention_states") is not None:
            kept = self._extended(now, live, kept)
        elif self._enabled() and kept is None:
            _warn_text_only(kwargs)
        if kept is not None:
            self._fit_mask(live, kept)
        return args, live

    def _extended(self, now: _Pass, live: dict[str, Any], kept: KeptKeys | None) -> KeptKeys | None:
        """Reduce the pictures of this pass; returns the keys its layers will hold, None where they hold all."""
        batch, _ = _shape(live)
        states: Tensor = live["cross_attention_states"]
        dense, device = states.numel() // (batch * states.shape[-1]), states.device
        new = self._reduce(now, live) if self._enabled() else None
        if new is None and kept is None:
            return None
        held = key_cache.held_keys(live.get("past_key_values"), self._layers[0], batch, device)
        new = all_keys(batch, dense, device) if new is None else new
        now.kept = new if held is None else held.joined(new)
        return now.kept

    def _reduce(self, now: _Pass, live: dict[str, Any]) -> KeptKeys | None:
        key_cache.require_growing(live.get("past_key_values"), self._layers)
        frame = self._local.frame
        inputs: Mapping[str, Any] = {} if frame is None else frame.inputs
        batch, tokens = _shape(live)
        mask, rows = live.get("cross_attention_mask"), live.get("full_text_row_masked_out_mask")
        tiles = self.parts.config.vision_config.max_num_tiles
        pictures = find_pictures(live["cross_attention_states"], batch, tiles, mask, rows, inputs)
        layout = pictures.layout
        if not layout.spans:
            _warn_text_only(live)
            return None
        text = None
        if any(cut.reducer.reads_text for cut in self.plan.keys):
            text = words_behind_pictures(self.parts, live, inputs, self._local.prompt)
        session, states, kept = reduce_keys(self.parts, self.plan, layout, pictures.states, text)
        held = key_cache.held_keys(live.get("past_key_values"), self._layers[0], batch, states.device)
        session.past = _past(live)
        session.attended = Attended(
            self._layers,
            tokens,
            layout.length,
            states.shape[1],
            0 if held is None else held.width,
            0 if held is None else held.index.shape[1],
        )
        now.session = session
        if kept is not None:
            live["cross_attention_states"] = states
        return kept

    def _fit_mask(self, live: dict[str, Any], kept: KeptKeys) -> None:
        mask, rows = live.get("cross_attention_mask"), live.get("full_text_row_masked_out_mask")
        if mask is None:
            self._set_mask(live, kept)
            return
        if mask.shape[-1] != kept.width:
            raise UnsupportedInputError(
                f"cross_attention_mask speaks of {mask.shape[-1]} keys, and the pictures seen so far have "
                f"{kept.width}. Give it a column for each picture of the conversation, in each pass."
            )
        live["cross_attention_mask"], live["full_text_row_masked_out_mask"] = take_columns(mask, rows, kept)

    def _set_mask(self, live: dict[str, Any], kept: KeptKeys) -> None:
        """Close padded keys where no mask is given, and nothing else."""
        _, tokens = _shape(live)
        decoder: Any = self.parts.decoder
        if not is_flash(str(self.parts.text_config._attn_implementation)):
            live["cross_attention_mask"] = open_mask(kept, tokens, decoder.dtype)
        elif kept.valid is not None:
            raise UnsupportedInputError(
                "The rows of this batch keep different numbers of keys, and FlashAttention takes no mask over them. "
                "Load the model with attn_implementation='sdpa'."
            )

    def _before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, cache = self._now.passes.top, kwargs.get("past_key_values")
        if now is not None and now.kept is not None and now.reader is not None and cache is not None:
            key_cache.announce_keys(cache, number, now.kept, now.reader)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        now = self._now.passes.leave()
        if now is not None and now.session is not None and output is not None:
            self._publish(now.session)


def _shape(kwargs: Mapping[str, Any]) -> tuple[int, int]:
    states = kwargs.get("inputs_embeds")
    states = kwargs["input_ids"] if states is None else states
    return int(states.shape[0]), int(states.shape[1])


def _warn_text_only(kwargs: Mapping[str, Any]) -> None:
    if _shape(kwargs)[1] > 1 and not _past(kwargs):
        warn_no_image()


def _past(kwargs: Mapping[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
