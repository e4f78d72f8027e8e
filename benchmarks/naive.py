"""The way methods are often written: eager attention with the whole map, Python loops over tokens, the mask kept.

Contestants for `mllm-squeeze bench --against benchmarks/naive.py`. They keep the same tokens as ours and shorten the
sequence in the same place, so what differs is how. Batch 1, models with one rotary position per token.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mllm_squeeze.bench.contestants import Contestant, State
from mllm_squeeze.bench.models import IMAGE, Prompt
from mllm_squeeze.upstream.calls import cache_of, with_cache
from mllm_squeeze.upstream.outputs import cache_of_output


class Naive(Contestant):
    """What the naive contestants share: the prompt's columns, and hooks that drop tokens at one layer."""

    kind = "naive"
    layer = 0

    def __init__(self, model: Any, prompt: Prompt, params: Mapping[str, Any]) -> None:
        super().__init__(model, prompt)
        self.params = dict(params)
        self.layer = int(params.get("layer", self.layer))
        ids = prompt.inputs["input_ids"][0].tolist()
        self.visual = [column for column, token in enumerate(ids) if token == IMAGE]
        self.text = list(range(self.visual[-1] + 1, len(ids)))
        self.budget = max(1, int(len(self.visual) * (1 - float(params["ratio"])) + 0.5))
        self.decoder = model.get_decoder()
        self.kept: list[int] = []

    def choose(self, hidden: Tensor) -> list[int]:
        """Return the columns of the visual tokens that stay, from the hidden states (1, T, D) at the cut."""
        raise NotImplementedError

    def all_kept(self, chosen: list[int]) -> list[int]:
        """Return the columns that stay, text included."""
        keep = set(chosen)
        visual = set(self.visual)
        return [column for column in range(self.prompt.length) if column in keep or column not in visual]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hook the layers."""
        self.kept = []
        handles = [
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            for number, layer in enumerate(self.decoder.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, number: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = args[0]
            if hidden.shape[1] == 1:
                return args, {**kwargs, "attention_mask": None}
            if number == self.layer:
                self.kept = self.all_kept(self.choose(hidden))
                hidden = hidden[:, self.kept, :]
            if number >= self.layer:
                kwargs = self._short(kwargs)
            elif kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = self._mask(hidden)
            return (hidden, *args[1:]), kwargs

        return before

    def _mask(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[-2]
        closed = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
        return closed.triu(1)[None, None]

    def _short(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Index rotary tables and the mask anew in each layer."""
        cos, sin = kwargs["position_embeddings"]
        mask = kwargs.get("attention_mask")
        mask = self._mask(cos) if mask is None else mask
        return {
            **kwargs,
            "position_ids": None,
            "position_embeddings": (cos[..., self.kept, :], sin[..., self.kept, :]),
            "attention_mask": mask[:, :, self.kept, :][:, :, :, self.kept],
        }


class NaiveFastV(Naive):
    """FastV with the whole attention map of the scoring layer."""

    layer = 2

    def __init__(self, model: Any, prompt: Prompt, params: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, params)
        self.map: Tensor | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Switch the layer before the cut to eager attention, and keep its map."""
        attention = self.decoder.layers[self.layer - 1].self_attn
        original = attention.config
        attention.config = copy.copy(original)
        attention.config._attn_implementation_internal = "eager"
        handle = attention.register_forward_hook(self._look)
        try:
            with super().active():
                yield
        finally:
            handle.remove()
            attention.config = original
            self.map = None

    def _look(self, module: Any, args: Any, output: Any) -> None:
        if output[1].shape[2] > 1:
            self.map = output[1]

    def choose(self, hidden: Tensor) -> list[int]:
        """Sort the last token's row."""
        assert self.map is not None
        scores = self.map.mean(dim=1)[0, -1].tolist()
        order = sorted(self.visual, key=lambda column: -scores[column])
        return sorted(order[: self.budget])


class NaiveDivPrune(Naive):
    """DivPrune with the minimum over all picked rows taken anew for each pick; survivors are renumbered."""

    def prefill(self, **more: Any) -> State:
        """Choose between the embeddings and the text model."""
        embeds = self.model.get_input_embeddings()(self.prompt.inputs["input_ids"]).clone()
        features = self.features.pooler_output
        embeds[0, self.visual] = torch.cat(list(features), 0).to(embeds.dtype)
        self.kept = self.all_kept(self.choose(embeds))
        short = embeds[:, self.kept, :]
        cache = DynamicCache(config=self.model.config.get_text_config())
        positions = torch.arange(len(self.kept), device=embeds.device)[None]
        out = self.decoder(
            inputs_embeds=short,
            position_ids=positions,
            attention_mask=self._mask(short),
            **with_cache(self.decoder, {}, cache),
        )
        return State(self.model.get_output_embeddings()(out.last_hidden_state[:, -1]), cache_of_output(out))

    def step(self, state: State, number: int) -> State:
        """Decode behind the renumbered prompt."""
        states = self.model.get_input_embeddings()(self.prompt.decoded[:, number : number + 1])
        positions = torch.tensor([[len(self.kept) + number]], device=states.device)
        out = self.decoder(inputs_embeds=states, position_ids=positions, **with_cache(self.decoder, {}, state.cache))
        return State(self.model.get_output_embeddings()(out.last_hidden_state[:, -1]), cache_of_output(out))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Nothing to hook: the prompt is short before the text model."""
        yield

    def choose(self, hidden: Tensor) -> list[int]:
        """Pick one by one."""
        features = hidden[0, self.visual].float()
        features = features / features.norm(dim=-1, keepdim=True)
        distance = 1 - features @ features.T
        picked: list[int] = []
        for _ in range(self.budget):
            if not picked:
                scores = torch.topk(distance, 2, dim=0, largest=False).values[1]
            else:
                scores = distance[picked].min(dim=0).values
                scores[picked] = -torch.inf
            picked.append(int(scores.argmax()))
        return sorted(self.visual[place] for place in picked)


class NaiveDart(Naive):
    """DART with a list of places that shrinks pivot by pivot."""

    layer = 2

    def __init__(self, model: Any, prompt: Prompt, params: Mapping[str, Any]) -> None:
        super().__init__(model, prompt, params)
        self.keys: Tensor | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep the keys of the layer before the cut, as they come out of its rotary embedding."""
        handle = self.decoder.layers[self.layer - 1].self_attn.register_forward_hook(self._look, with_kwargs=True)
        try:
            with super().active():
                yield
        finally:
            handle.remove()
            self.keys = None

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = cache_of(kwargs).layers[self.layer - 1]
        if layer.keys.shape[2] == self.prompt.length:
            self.keys = layer.keys

    def choose(self, hidden: Tensor) -> list[int]:
        """Take turns over the pivots."""
        assert self.keys is not None
        norms = self.keys[0].transpose(0, 1).flatten(1).float().abs().sum(-1)
        normed = self.decoder.norm(hidden)[0].float()
        unit = normed / normed.norm(dim=-1, keepdim=True)
        image = sorted(self.visual, key=lambda column: -float(norms[column]))[:4]
        words = sorted(self.text, key=lambda column: -float(norms[column]))[:4]
        kept = list(image)
        left = [column for column in self.visual if column not in kept]
        rest = self.budget - len(kept)
        pivots = image + words
        for turn, pivot in enumerate(pivots):
            quota = rest // len(pivots) + (turn < rest % len(pivots))
            similar = (unit[left] @ unit[pivot]).argsort().tolist()
            taken = [left[place] for place in similar[:quota]]
            kept += taken
            left = [column for column in left if column not in set(taken)]
        return sorted(kept)


CONTESTANTS = {"fastv": NaiveFastV, "divprune": NaiveDivPrune, "dart": NaiveDart}

if __name__ == "__main__":
    sys.exit("Run: mllm-squeeze bench --against benchmarks/naive.py")
