"""Hooks on the encoder of sound: what its last block attends to is read where a method asks for it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from mllm_squeeze.engine.encoder.seen_way import SeenWays
from mllm_squeeze.engine.encoder.sound import SoundCall
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks
from mllm_squeeze.engine.signals.rows import Listener
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.structure import find_attention
from mllm_squeeze.reducers.needs import SoundAttention
from mllm_squeeze.upstream.outputs import packed
from mllm_squeeze.upstream.prompts import flat

_METHOD = "get_audio_features"


class SoundHooks(Hooks):
    """Records each call of a family's feature method for sound."""

    def attach(self, installer: Installer) -> None:
        """Put the hooks on, where a cut reads what the encoder attends to."""
        if SoundAttention() not in self.plan.needs:
            return
        tower, block = self.parts.sound_tower, self.parts.sound_block
        assert tower is not None
        assert block is not None
        attention = find_attention(block)
        assert attention is not None
        self._ways = SeenWays(self.parts, tower, block)
        installer.override(self.parts.base, _METHOD, self._recording(getattr(self.parts.base, _METHOD)))
        installer.tap(attention, self._listener)

    def _listener(self) -> Listener | None:
        call = self._local.sounds.top
        return None if call is None else call.read

    def _recording(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def record(*args: Any, **kwargs: Any) -> Any:
            run = self._local.prompt_run
            if not self._enabled() or run is None:
                return original(*args, **kwargs)
            call = SoundCall()
            output = self._heard(call, lambda: original(*args, **kwargs))
            features = packed(output)
            if features is None:
                raise UnsupportedInputError(
                    f"{_METHOD} gave a {type(output).__name__} without the features of all sound side by side. Use a "
                    "method that reads nothing of the audio encoder."
                )
            inputs, number = flat(original, args, kwargs), len(features)
            again = functools.partial(self._heard, None, lambda: original(*args, **kwargs))
            made = self._ways.made(again, "audio", inputs, [number], call.tokens)
            found = call.received(made, self._per_prompt(run.call.ids, number))
            run.features["audio"] = Features("audio", None, signals={SoundAttention(): (found,)})
            return output

        return record

    def _heard(self, call: SoundCall | None, function: Callable[[], Any]) -> Any:
        """Call a function; its attention is read by a call, or not at all."""
        entry = self._local.sounds.enter(call, sys._getframe())
        try:
            return function()
        finally:
            self._local.sounds.leave(entry)

    def _per_prompt(self, ids: Any, number: int) -> list[int]:
        """Return how many tokens of sound each prompt has; ids: int64 (B, T)."""
        counts: list[int] = [] if ids is None else (ids == self.parts.ids["audio"]).sum(1).tolist()
        if sum(counts) != number:
            raise UnsupportedInputError(
                f"The prompt holds {sum(counts)} placeholders for sound, and the encoder gave {number} tokens. Give "
                "input_ids, whole and with the sound that they speak of."
            )
        return counts
