"""Notes which calls of a model run now: of generate(), of the whole model, and of the inner one that takes pictures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import nn

from mllm_squeeze.engine.encoders import recorded
from mllm_squeeze.engine.fittings import Fittings
from mllm_squeeze.engine.frames import Frame, Local, prompt_length, wanted_tail
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.static_step import is_traced_step
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts


class CallHooks:
    """Keeps `local` told of the calls that run in this thread, with their inputs.

    enabled: says whether the handle is switched on now.
    """

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, enabled: Callable[[], bool]) -> None:
        self.parts, self.plan = parts, plan
        self._local, self._enabled = local, enabled

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.plan.refuse_copy()

    def attach(self, fittings: Fittings) -> None:
        """Put the hooks on."""
        self._override_generate(fittings)
        fittings.around(self.parts.model, self._enter_model, self._leave_model)
        fittings.around(self.parts.base, self._enter_base, self._leave_base)

    def _override_generate(self, fittings: Fittings) -> None:
        original: Any = getattr(self.parts.model, "generate", None)
        if original is None:
            return

        # Assisted decoding feeds prompt and guesses in one pass; only generate() knows where the prompt ends.
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
            given = {**given.pop("kwargs", {}), **given.pop("generate_kwargs", {}), **given}
            if self._enabled():
                _refuse_chunks(self.parts.model, given)
            before, self._local.prompt = self._local.prompt, prompt_length(given)
            if self.parts.row.own_generate:
                self._local.frames.enter(Frame(given))
            try:
                return original(*args, **kwargs)
            finally:
                self._local.prompt = before
                if self.parts.row.own_generate:
                    self._local.frames.leave()

        fittings.override(self.parts.model, "generate", generate)

    def _enter_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_traced_step(kwargs):
            return None
        return args, self._local.tails.enter(wanted_tail(module, kwargs), kwargs)

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_traced_step(kwargs):
            self._local.tails.leave()

    def _enter_base(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_traced_step(kwargs):
            return None
        inputs = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs if args else kwargs
        frame = Frame(inputs)
        live = self._local.frames.enter(frame, kwargs)
        for modality, output in (inputs.get("mm_encoder_outputs") or {}).items():
            if output is None or not self._enabled():
                continue
            found = recorded(self.plan, output)
            if found is None:
                raise UnsupportedInputError(
                    f"The {modality} features of this call were encoded without the handle, or the prompt is prefilled "
                    "in chunks. Encode them after squeeze.apply, and leave prefill_chunk_size unset."
                )
            if not self.parts.row.by_runs:
                frame.features[modality] = found
        return args, live

    def _leave_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_traced_step(kwargs):
            self._local.frames.leave()


def _refuse_chunks(model: Any, given: Mapping[str, Any]) -> None:
    """given: arguments of generate()."""
    config = given.get("generation_config") or getattr(model, "generation_config", None)
    if given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
        raise UnsupportedInputError(
            "A prompt that is prefilled in chunks cannot be squeezed: no pass holds all of a picture. Leave "
            "prefill_chunk_size unset."
        )
