"""Hooks on the encoders of a model: what they give is recorded, scored, and merged on the way where a method asks."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mllm_squeeze.engine.encoder.blocks import block_of, is_of_states
from mllm_squeeze.engine.encoder.call import EncodeCall, SeenCarry
from mllm_squeeze.engine.encoder.merging import EncoderMerge
from mllm_squeeze.engine.encoder.seen_way import SeenWays
from mllm_squeeze.engine.hooks.current import Local
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.owner import Hooks, Publish
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.rows import Listener
from mllm_squeeze.engine.tokens.recorded import comparer, mark, merger, recorded
from mllm_squeeze.errors import SqueezeWarning, UnsupportedModelError
from mllm_squeeze.family.handlers.sub_images import by_runs, lay_out
from mllm_squeeze.family.structure import ModelParts, find_attention
from mllm_squeeze.reducers.needs import Embedding, EncoderStates, Sensitivity
from mllm_squeeze.upstream.calls import LayerCall, with_block_mask
from mllm_squeeze.upstream.outputs import block_states
from mllm_squeeze.upstream.prompts import EmbedderCall, flat, vision_inputs


class EncoderHooks(Hooks):
    """Records each call of a family's feature methods."""

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, requests: Requests, publish: Publish) -> None:
        super().__init__(parts, plan, local, requests, publish)
        self._signals = plan.encoder_needs
        self._ways = SeenWays(parts)

    def attach(self, installer: Installer) -> None:
        """Put the hooks on.

        Raises:
            UnsupportedModelError: a part that the plan needs was not found, or was patched by other code.
        """
        self._override_features(installer)
        self._hook_blocks(installer)
        self._tap_signals(installer)
        if self.parts.projector is not None and any(isinstance(need, Sensitivity) for need in self._signals):
            installer.after(self.parts.projector, self._push)
        if self._signals and self.parts.embedder is not None:
            installer.around(self.parts.embedder, self._before_embedder, self._after_embedder)

    def _override_features(self, installer: Installer) -> None:
        # Audio needs no override: it is encoded in each forward, and a run of placeholders is one recording.
        for modality in (modality for modality in self.parts.ids if modality != "audio"):
            name = f"get_{modality}_features"
            original = getattr(self.parts.base, name, None)
            if original is not None:
                installer.override(self.parts.base, name, self._recording(modality, original))

    def _recording(self, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
        # generate() reads the signature, which `wraps` keeps.
        @functools.wraps(original)
        def record(*args: Any, **kwargs: Any) -> Any:
            # Some families encode videos through their image method: the outer call is the one that counts.
            if not self._enabled() or self._local.encode is not None:
                return original(*args, **kwargs)
            inputs = vision_inputs(modality, flat(original, args, kwargs))
            plan = self._requests.planned()
            merge = self._merge_for(modality, plan)
            call = EncodeCall(self.parts, modality, self._signals, merge, self.plan.text_encoder)
            entry = self._local.encodings.enter(call, sys._getframe())
            try:
                output = original(*args, **kwargs)
            finally:
                self._local.encodings.leave(entry)
            if isinstance(output, tuple):
                return output
            # Who hands out what was encoded before, as a cache of features does, hands out what was recorded then.
            found = recorded(plan, output)
            if found is None:
                found = call.features(inputs, output, self._seen(modality, lambda: original(*args, **kwargs)))
                found = replace(found, merged_by=merger(plan), compared_by=comparer(plan))
                mark(output, found)
            if self._local.prompt_run is not None and not self.parts.row.by_runs:
                self._local.prompt_run.features[modality] = found
            return output

        return record

    def _seen(self, modality: str, original: Callable[[], Any]) -> SeenCarry:
        """Return what carries values where the way has to be found, by another run of the feature method."""

        def again() -> Any:
            # An inner feature method, and the taps, find a call that wants nothing.
            entry = self._local.encodings.enter(EncodeCall(self.parts, modality, ()), sys._getframe())
            try:
                return original()
            finally:
                self._local.encodings.leave(entry)

        return functools.partial(self._ways.carry, again)

    def _merge_for(self, modality: str, plan: Plan) -> EncoderMerge | None:
        last = self.parts.feature_block
        if plan.encoder is None or last is None or modality not in plan.encoder.facts.modalities:
            return None
        if modality == "video" and self.parts.row.tower_to_llm != "identity":
            warnings.warn(
                f"'{plan.encoder.name}' leaves videos alone in '{self.parts.row.model_type}', which pools their "
                "tokens behind the encoder; use a method that acts at the projector for them.",
                SqueezeWarning,
                stacklevel=2,
            )
            return None
        blocks = plan.encoder_blocks or tuple(range(1, last + 1))
        return EncoderMerge(self.parts, plan.encoder.reducer, plan.encoder.amount, blocks)

    def _hook_blocks(self, installer: Installer) -> None:
        last, blocks, projector = self.parts.feature_block, self.parts.blocks, self.parts.projector
        if self.plan.encoder is None or blocks is None or projector is None or last is None:
            return
        for number in (block - 1 for block in self.plan.encoder_blocks or range(1, last + 1)):
            attention = find_attention(blocks[number])
            if attention is None:
                raise UnsupportedModelError(
                    f"Block {number} of the vision encoder has no attention whose keys can be read."
                )
            installer.tap(attention, self._merge_listener)
            before = functools.partial(self._before_block, number + 1)
            installer.before(blocks[number + 1], before)
        installer.after(projector, self._after_projector)

    def _merge_listener(self) -> Listener | None:
        merge = None if self._local.encode is None else self._local.encode.merge
        return None if merge is None else merge.read

    def _before_block(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        merge = None if self._local.encode is None else self._local.encode.merge
        if merge is None:
            return None
        call = LayerCall.read(args, kwargs)
        hidden, bias = merge.merge(number, call.hidden), merge.bias
        call = call.replace(hidden=hidden)
        return (call if bias is None else with_block_mask(call, bias.to(hidden.dtype))).out()

    def _after_projector(self, module: nn.Module, args: Any, output: Any) -> Any:
        merge = None if self._local.encode is None else self._local.encode.merge
        return None if merge is None else merge.restore(output)

    def _tap_signals(self, installer: Installer) -> None:
        needs = self._signals
        for block in sorted({block for need in needs if (block := block_of(need, self.parts)) is not None}):
            assert self.parts.blocks is not None
            module = self.parts.blocks[block]
            mine = [need for need in needs if block_of(need, self.parts) == block]
            attention = find_attention(module)
            if any(not isinstance(need, (EncoderStates, Embedding)) for need in mine):
                if attention is None:
                    raise UnsupportedModelError(
                        f"Block {block} of the vision encoder of '{self.parts.row.model_type}' has no attention that "
                        "could be read. Use a method that reads nothing of the vision encoder.",
                        avoid=["encoder attention"],
                    )
                installer.tap(attention, functools.partial(self._attention_listener, block))
            if any(is_of_states(need) for need in mine):
                installer.after(module, functools.partial(self._after_block, block))

    def _attention_listener(self, block: int) -> Listener | None:
        encode = self._local.encode
        return None if encode is None else functools.partial(encode.read_attention, block)

    def _after_block(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._local.encode is not None:
            self._local.encode.read_states(block, block_states(output))

    def _push(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._local.encode is not None:
            self._local.encode.push_projector(module, args[0])

    # Where pictures are encoded inside the text model, the prompt's layout is known by then, and each run of
    # placeholders is an item.

    def _before_embedder(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._enabled() and self._local.encode is None:
            self._local.encodings.enter(EncodeCall(self.parts, "image", self._signals, None, self.plan.text_encoder))

    def _after_embedder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        encode, running = self._local.encodings.leave(), self._local.running
        if encode is None or output is None or not isinstance(running, Prefill) or "image" not in running.features:
            return
        call = EmbedderCall.read(module, args, kwargs)

        def carry(values: Tensor, fill: float) -> Sequence[Tensor]:
            return by_runs(call.ids, self.parts.ids["image"], lay_out(self.parts.config, call, values, fill))

        found = replace(running.features["image"], signals=encode.signals(carry))
        running.features = {**running.features, "image": found}
