"""Notes which calls of a model run now: of generate(), of the whole model, and of the inner one that takes pictures."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from mllm_squeeze.engine.decode.static_step import is_traced_step
from mllm_squeeze.engine.hooks.current import PromptRun, Whole
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.engine.tokens.recorded import recorded
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream.prompts import GenerateCall, PromptCall, flat, wanted_tail


class CallHooks(Hooks):
    """Keeps `local` told of the calls that run in this thread, with their inputs."""

    def attach(self, installer: Installer) -> None:
        """Put the hooks on."""
        self._override_generate(installer)
        installer.around(self.parts.model, self._enter_model, self._leave_model)
        installer.around(self.parts.base, self._enter_base, self._leave_base)

    def _override_generate(self, installer: Installer) -> None:
        original: Any = getattr(self.parts.model, "generate", None)
        if original is None:
            return

        # Assisted decoding feeds prompt and guesses in one pass; only generate() knows where the prompt ends.
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            call = GenerateCall(flat(original, args, kwargs))
            if self._enabled():
                _refuse_chunks(self.parts.model, call)
            here = sys._getframe()
            prompt = self._local.prompts.enter(call, here)
            runs = self._local.prompt_runs
            run = runs.enter(PromptRun(PromptCall(call.given)), here) if self.parts.row.own_generate else None
            try:
                return original(*args, **kwargs)
            finally:
                self._local.prompts.leave(prompt)
                if run is not None:
                    runs.leave(run)

        installer.override(self.parts.model, "generate", generate)

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_traced_step(kwargs):
            return
        call = PromptCall.read(module, args, kwargs)
        given = call.encoded if self._enabled() else {}
        encoded = {modality: recorded(self._requests.planned(), output) for modality, output in given.items()}
        known = {modality: found for modality, found in encoded.items() if found is not None}
        self._local.wholes.enter(Whole(wanted_tail(module, kwargs), known))

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_traced_step(kwargs):
            self._local.wholes.leave()

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_traced_step(kwargs):
            return
        run = PromptRun(PromptCall.read(module, args, kwargs))
        self._local.prompt_runs.enter(run)
        for modality, output in run.call.encoded.items() if self._enabled() else ():
            found = recorded(self._requests.planned(), output) or self._brought(modality)
            if found is None:
                raise UnsupportedInputError(
                    f"The {modality} features of this call were encoded without the handle, or the prompt is prefilled "
                    "in chunks. Encode them after squeeze.apply, and leave prefill_chunk_size unset."
                )
            if not self.parts.row.by_runs:
                run.features[modality] = found

    def _brought(self, modality: str) -> Features | None:
        """Return what the call of the whole model knew of its features: accelerate rebuilds them on their way here."""
        whole = self._local.wholes.top
        return None if whole is None else whole.encoded.get(modality)

    def _leave_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_traced_step(kwargs):
            self._local.prompt_runs.leave()


def _refuse_chunks(model: nn.Module, call: GenerateCall) -> None:
    if call.in_chunks(model):
        raise UnsupportedInputError(
            "A prompt that is prefilled in chunks cannot be squeezed: no pass holds all of a picture. Leave "
            "prefill_chunk_size unset."
        )
