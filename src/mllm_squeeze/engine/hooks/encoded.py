"""Hooks on a decoder that attends to what an encoder gave: rows of it leave, in every pass the same ones."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.hooks.current import Calls, Local
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks, Publish
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.keys import cache_layer as key_cache
from mllm_squeeze.engine.keys.kept import KeptKeys, reduce_keys, take_row_mask
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.sequence.shorten import gather_rows
from mllm_squeeze.engine.tokens.prompt import warn_no_image
from mllm_squeeze.engine.trace import Attended
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.handlers.encoder_rows import picture_rows
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream import caches
from mllm_squeeze.upstream.attended import QueryCall
from mllm_squeeze.upstream.calls import Arguments, TextCall
from mllm_squeeze.upstream.outputs import cache_of_output


@dataclass
class _Reading:
    """One call of the decoder. kept: rows of the encoder that it attends to, None for all; cache: that it got."""

    cache: Any
    prefill: Prefill | None = None
    kept: KeptKeys | None = None


class _Now(threading.local):
    def __init__(self) -> None:
        self.passes: Calls[_Reading] = Calls()


class EncodedHooks(Hooks):
    """Takes rows of a decoder's `encoder_hidden_states`, and columns of the mask over them.

    The first pass chooses; its cache then knows what is left, and later passes on it are told the same.
    """

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, requests: Requests, publish: Publish) -> None:
        super().__init__(parts, plan, local, requests, publish)
        self._now = _Now()

    def attach(self, installer: Installer) -> None:
        """Put the hooks on."""
        installer.around(self.parts.decoder, self._enter, self._leave)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        call = TextCall.read(module, args, kwargs)
        now = _Reading(call.cache)
        entry = self._now.passes.enter(now)
        live, encoded = dict(call.named), QueryCall.read(call.named)
        if encoded.states is None:
            return (), live
        crossed = caches.crossed(call.cache)
        now.kept = key_cache.open_keys(crossed, entry)
        states = encoded.states
        if now.kept is not None:
            states = _taken(states, now.kept)
        elif self._enabled() and not _holds(crossed):
            states = self._reduce(now, call, states, encoded.mask)
        if now.kept is not None:
            live.update(QueryCall(states, take_row_mask(encoded.mask, now.kept)).arguments())
        return (), live

    def _reduce(self, now: _Reading, call: TextCall, states: Tensor, mask: Tensor | None) -> Tensor:
        """Choose what is left of the states; returns (B, M, D)."""
        prompt, run = self._local.prompts.top, self._local.prompt_run
        ids = None if prompt is None else prompt.ids
        if ids is None and run is not None:
            ids = run.call.ids
        layout = picture_rows(self.parts, states, mask, ids)
        if not layout.spans:
            self._publish(None)
            warn_no_image()
            return states
        rows = None if prompt is None else prompt.encoded_rows
        prefill, short, kept = reduce_keys(self.parts, self._requests.planned(), layout, states, rows=rows)
        layers = tuple(range(len(self.parts.layers)))
        prefill.attended = Attended(layers, call.width, layout.length, short.shape[1])
        now.prefill, now.kept = prefill, kept
        if kept is not None:
            key_cache.require_growing(caches.crossed(call.cache), layers)
        return short

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        now = self._now.passes.leave()
        if now is None:
            return
        if now.kept is not None:
            # Some decoders make their cache while they run, or put the one they got into another.
            for cache in (now.cache, None if output is None else cache_of_output(output)):
                key_cache.note_keys(caches.crossed(cache), now.kept)
        if now.prefill is not None and output is not None:
            self._publish(now.prefill)


def _taken(states: Tensor, kept: KeptKeys) -> Tensor:
    """Return the rows that an earlier pass kept: their keys are in the cache, and only their number counts."""
    if states.shape[:2] != (len(kept.index), kept.width):
        raise UnsupportedInputError(
            f"The encoder gave {states.shape[0]} rows of {states.shape[1]}, and the cache was made of "
            f"{len(kept.index)} rows of {kept.width}. Pass what the encoder gave for this cache."
        )
    return gather_rows(states, kept.index)


def _holds(crossed: Any) -> bool:
    """True where a cache already holds what the encoder gave, all of it."""
    return any(layer.is_initialized for layer in caches.layers_of(crossed))
