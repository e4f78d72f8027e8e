"""Hooks on a text model that attends to its pictures: their keys get fewer before the first cross-attention layer."""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.hooks.current import Calls, Local
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks, Publish
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.keys import cache_layer as key_cache
from mllm_squeeze.engine.keys.kept import KeptKeys, all_keys, open_mask, reduce_keys, take_columns
from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.sequence.shorten import is_flash
from mllm_squeeze.engine.tokens.prompt import warn_no_image, words_behind_pictures
from mllm_squeeze.engine.trace import Attended
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.handlers.cross_attention import cross_layers, find_pictures
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.attended import CrossCall
from mllm_squeeze.upstream.attention import implementation
from mllm_squeeze.upstream.calls import Arguments, TextCall, cache_of
from mllm_squeeze.upstream.prompts import PromptCall


@dataclass
class _Pass:
    """One call of the text model: what was reduced in it, and which keys its layers will then hold."""

    prefill: Prefill | None = None
    kept: KeptKeys | None = None
    reader: weakref.ref[key_cache.Reader] | None = None


class _Now(threading.local):
    def __init__(self) -> None:
        self.passes: Calls[_Pass] = Calls()


class CrossAttentionHooks(Hooks):
    """Takes rows of the states that the text attends to, and in every later pass columns of the mask over them."""

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, requests: Requests, publish: Publish) -> None:
        super().__init__(parts, plan, local, requests, publish)
        self._layers = cross_layers(parts.layers)
        self._now = _Now()

    def attach(self, installer: Installer) -> None:
        """Put the hooks on."""
        installer.around(self.parts.decoder, self._enter, self._leave)
        for number in self._layers:
            installer.before(self.parts.layers[number], functools.partial(self._before_layer, number))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        now, call = _Pass(), TextCall.read(module, args, kwargs)
        live, entry = dict(call.named), self._now.passes.enter(now)
        now.reader = weakref.ref(entry)
        cross = CrossCall.read(call)
        kept = key_cache.open_keys(call.cache, entry)
        if cross.states is not None:
            kept, cross = self._extended(now, call, cross, cross.states, kept)
        elif self._enabled() and kept is None:
            self._note_text_only(call)
        if kept is not None:
            live.update(self._fitted(call, cross, kept).arguments())
        return (), live

    def _extended(
        self, now: _Pass, call: TextCall, cross: CrossCall, states: Tensor, kept: KeptKeys | None
    ) -> tuple[KeptKeys | None, CrossCall]:
        """Reduce the pictures of this pass; returns the keys its layers will hold, None where they hold all.

        states: of all pictures of the pass.
        """
        dense = states.numel() // (call.batch * states.shape[-1])
        new, short = self._reduce(now, call, cross) if self._enabled() else (None, cross)
        if new is None and kept is None:
            return None, cross
        held = key_cache.held_keys(call.cache, self._layers[0], call.batch, states.device)
        new = all_keys(call.batch, dense, states.device) if new is None else new
        now.kept = new if held is None else held.joined(new)
        return now.kept, short

    def _reduce(self, now: _Pass, call: TextCall, cross: CrossCall) -> tuple[KeptKeys | None, CrossCall]:
        run = self._local.prompt_run
        prompted = PromptCall({}) if run is None else run.call
        tiles = self.parts.config.vision_config.max_num_tiles
        pictures = find_pictures(cross, call.batch, tiles, prompted)
        layout = pictures.layout
        if not layout.spans:
            self._note_text_only(call)
            return None, cross
        text = None
        if any(cut.facts.reads_text for cut in self.plan.keys):
            text = words_behind_pictures(self.parts, call, prompted, self._local.prompt)
        past = kv.tokens_seen(call.cache)
        prefill, states, kept = reduce_keys(
            self.parts, self._requests.planned(), layout, pictures.states, text, past, self._local.rows
        )
        held = key_cache.held_keys(call.cache, self._layers[0], call.batch, states.device)
        prefill.attended = Attended(
            self._layers,
            call.width,
            layout.length,
            states.shape[1],
            0 if held is None else held.width,
            0 if held is None else held.index.shape[1],
        )
        now.prefill = prefill
        if kept is None:
            return None, cross
        key_cache.require_growing(call.cache, self._layers)
        return kept, cross.replace(states=states)

    def _fitted(self, call: TextCall, cross: CrossCall, kept: KeptKeys) -> CrossCall:
        """Return the call with a mask over the keys that are left."""
        if cross.mask is None:
            return cross.replace(mask=self._new_mask(call, kept))
        if cross.mask.shape[-1] != kept.width:
            raise UnsupportedInputError(
                f"cross_attention_mask speaks of {cross.mask.shape[-1]} keys, and the pictures seen so far have "
                f"{kept.width}. Give it a column for each picture of the conversation, in each pass."
            )
        mask, rows = take_columns(cross.mask, cross.rows, kept)
        return cross.replace(mask=mask, rows=rows)

    def _new_mask(self, call: TextCall, kept: KeptKeys) -> Tensor | None:
        """Return a mask that closes padded keys and nothing else, where none was given."""
        decoder: Any = self.parts.decoder
        if not is_flash(implementation(self.parts.text_config)):
            return open_mask(kept, call.width, decoder.dtype)
        if kept.valid is not None:
            raise UnsupportedInputError(
                "The rows of this batch keep different numbers of keys, and FlashAttention takes no mask over them. "
                "Load the model with attn_implementation='sdpa'."
            )
        return None

    def _before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, cache = self._now.passes.top, cache_of(kwargs)
        if now is not None and now.kept is not None and now.reader is not None and cache is not None:
            key_cache.announce_keys(cache, number, now.kept, now.reader)

    def _note_text_only(self, call: TextCall) -> None:
        if call.width > 1 and not kv.tokens_seen(call.cache):
            self._publish(None)
            warn_no_image()

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        now = self._now.passes.leave()
        if now is not None and now.prefill is not None and output is not None:
            self._publish(now.prefill)
