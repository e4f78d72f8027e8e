"""Who takes part: the dense model, a method of ours, its oracle, and whatever another file brings along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import mllm_squeeze as squeeze
from mllm_squeeze.bench.models import IMAGE, Prompt
from mllm_squeeze.bench.oracle import Oracle, kept_columns
from mllm_squeeze.upstream.calls import with_cache, without_cache
from mllm_squeeze.upstream.outputs import cache_of_output


@dataclass
class State:
    """What a prefill leaves: logits of the last position (B, V), and the cache."""

    logits: Tensor
    cache: Any


class Contestant:
    """The dense model, and the base of the others.

    `active` puts on what the contestant needs, outside the clock. `encode`, `prefill` and `step` are timed.
    """

    kind = "dense"
    # "dynamic"; "static", of fixed size; or "compiled": static, and decode steps run compiled, as generate() does it.
    cache = "dynamic"

    def __init__(self, model: Any, prompt: Prompt, name: str = "dense") -> None:
        self.model, self.prompt, self.name = model, prompt, name
        self.features: Any = None
        self._seen: tuple[dict[str, Any], dict[str, Any]] | None = None

    def active(self) -> Any:
        """Return a context inside of which the contestant runs."""
        return nullcontext()

    def encode(self) -> Any:
        """Run the vision encoder and the projector."""
        return self.model.model.get_image_features(**self.prompt.vision, return_dict=True)

    def prepare(self) -> None:
        """Compute the features that every prefill is fed, and let go of what else the encoder returns."""
        with self.active():
            self.features = self.encode()
        for name in ("hidden_states", "last_hidden_state", "attentions"):
            if getattr(self.features, name, None) is not None:
                setattr(self.features, name, None)

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the keyword arguments that the text model and its first layer get in a prefill."""
        if self._seen is None:
            self._seen = _arguments(self.model.get_decoder(), self)
        return self._seen

    def new_cache(self) -> Any:
        """Return an empty cache."""
        config = self.model.config.get_text_config()
        if self.cache == "dynamic":
            return DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=self.prompt.length + self.prompt.decoded.shape[1])

    def prefill(self, **more: Any) -> State:
        """Run the prompt to the logits of its last position."""
        out = self.model(
            **self.prompt.inputs,
            position_ids=self.prompt.positions,
            **with_cache(self.model, {}, self.new_cache()),
            use_cache=True,
            logits_to_keep=1,
            mm_encoder_outputs={"image": self.features},
            **more,
        )
        return State(out.logits[:, -1], cache_of_output(out))

    def step(self, state: State, number: int) -> State:
        """Decode one token."""
        call, seen = self.model, None
        if self.cache == "dynamic":
            mask = self.prompt.inputs["attention_mask"]
            seen = mask.new_ones(mask.shape[0], mask.shape[1] + number + 1)
        elif self.cache == "compiled":
            call = self.model.get_compiled_call(None)
        out = call(
            input_ids=self.prompt.decoded[:, number : number + 1],
            attention_mask=seen,
            position_ids=self.prompt.after[..., number : number + 1],
            **with_cache(self.model, {}, state.cache),
            use_cache=True,
        )
        return State(out.logits[:, -1], cache_of_output(out))


class Squeezed(Contestant):
    """A method of ours."""

    kind = "ours"

    def __init__(self, model: Any, prompt: Prompt, method: str, params: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, method)
        self.method, self.params = method, dict(params)
        self.handle: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Apply the method inside the block."""
        with squeeze.applied(self.model, self.method, **self.params) as self.handle:
            yield


class Ideal(Contestant):
    """The oracle of a method: the plain model on what the method kept."""

    kind = "oracle"

    def __init__(self, ours: Squeezed, oracle: Oracle, features: Any) -> None:
        super().__init__(ours.model, ours.prompt, f"oracle of {ours.name}")
        self.ours, self.oracle, self.features = ours, oracle, features

    def active(self) -> Any:
        """Hook the layers behind the cuts."""
        return self.oracle.hooked()

    def prefill(self, **more: Any) -> State:
        """Run the survivors to the logits of the last position."""
        if self.oracle.short is None:
            return super().prefill(**more)
        cache = DynamicCache(config=self.model.config.get_text_config())
        out = self.oracle.decoder(**with_cache(self.oracle.decoder, self.oracle.short, cache))
        return State(self.model.get_output_embeddings()(out.last_hidden_state[:, -1]), cache_of_output(out))

    def step(self, state: State, number: int) -> State:
        """Decode one token."""
        self.oracle.step = number
        if self.oracle.short is None:
            return super().step(state, number)
        states = self.model.get_input_embeddings()(self.prompt.decoded[:, number : number + 1])
        out = self.oracle.decoder(
            inputs_embeds=states,
            position_ids=self.oracle.place_after(number),
            **with_cache(self.oracle.decoder, {}, state.cache),
            use_cache=True,
        )
        return State(self.model.get_output_embeddings()(out.last_hidden_state[:, -1]), cache_of_output(out))


@torch.inference_mode()
def oracle_of(ours: Squeezed, dense: Contestant) -> Ideal:
    """Run a method once, and return the oracle of what it kept. The dense contestant must be prepared."""
    with ours.active():
        ours.prefill()
        cuts = kept_columns(ours.handle.cuts, ours.prompt.inputs["input_ids"].shape[0])
        repack = ours.handle.recipe.positions == "repack" and ours.prompt.positions.ndim == 2
    decoder = ours.model.get_decoder()
    given, inside = dense.arguments()
    visual = ours.prompt.inputs["input_ids"] == IMAGE
    oracle = Oracle(decoder, given, inside, cuts, visual, ours.prompt.after, repack)
    return Ideal(ours, oracle, dense.features)


def _arguments(decoder: Any, dense: Contestant) -> tuple[dict[str, Any], dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(kwargs))

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in (decoder, decoder.layers[0])]
    try:
        dense.prefill()
    finally:
        for handle in handles:
            handle.remove()
    return without_cache(seen[0]), without_cache(seen[1])
