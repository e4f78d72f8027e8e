"""The oracle: the plain model on the survivors only, with nothing computed for the choice. Imports no engine.

Which columns survive is known before the clock starts; then a cut costs one gather of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.errors import UnsupportedInputError


@dataclass
class Stage:
    """What the layers from one cut on get: all made before the clock starts.

    layer: first layer. columns: int64 (B, M) of the prompt. take: int64 (B, M, 1), where these stand in the sequence
    before the cut. rope: rotary tables. mask: attention mask or None. visual: bool (B, M). number: int64 (V,), rows of
    the visual features that are left.
    """

    layer: int
    columns: Tensor
    take: Tensor
    rope: Any
    mask: Tensor | None
    visual: Tensor
    number: Tensor


def kept_columns(cuts: Sequence[Any], batch: int) -> list[tuple[int, Tensor]]:
    """Return (layer, int64 (B, M)) of each cut; several at one layer count as the last.

    Raises:
        UnsupportedInputError: samples keep different numbers of tokens.
    """
    found: dict[int, Tensor] = {}
    for cut in cuts:
        if len({len(kept) for kept in cut.kept}) != 1 or len(cut.kept) != batch:
            raise UnsupportedInputError("The oracle needs samples that keep equally many tokens; use batch 1.")
        found[cut.layer] = torch.stack(list(cut.kept))
    return sorted(found.items())


class Oracle:
    """The plain model with cuts that are known beforehand.

    decoder: the text model. given: the keyword arguments that the dense model passes to it. inside: those that its
    first layer gets. repack: survivors are renumbered.
    """

    def __init__(
        self,
        decoder: Any,
        given: Mapping[str, Any],
        inside: Mapping[str, Any],
        cuts: Sequence[tuple[int, Tensor]],
        visual: Tensor,
        after: Tensor,
        repack: bool = False,
    ) -> None:
        self.decoder, self.repack, self.after = decoder, repack, after
        self.length = visual.shape[1]
        self._given, self._inside = given, inside
        before = torch.arange(self.length).expand(visual.shape[0], -1)
        self.stages: list[Stage] = []
        for layer, columns in cuts:
            self.stages.append(self._stage(layer, columns, before, visual))
            before = columns
        self.by_length = {stage.columns.shape[1]: stage for stage in self.stages}
        # Rotary tables of each decode step behind each cut, where survivors are renumbered.
        self._later = [
            [self._rotary(torch.full((1, 1), stage.columns.shape[1] + t)) for t in range(after.shape[-1])]
            for stage in self.stages
            if repack
        ]
        self.step = 0
        # The sequence is short from the start, so the text model gets it so: no wrapper, no hook at layer 0.
        self.short = self._shortened() if self.stages and self.stages[0].layer == 0 else None

    def _stage(self, layer: int, columns: Tensor, before: Tensor, visual: Tensor) -> Stage:
        take = torch.searchsorted(before.contiguous(), columns)
        device = visual.device
        columns = columns.to(device)
        seen = visual.gather(1, columns)
        number = (visual.flatten().cumsum(0) - 1).view_as(visual).gather(1, columns)[seen]
        rope = self._rotary(torch.arange(columns.shape[1])[None]) if self.repack else _rows(self._rope, columns)
        return Stage(layer, columns, take.to(device)[..., None], rope, self._mask(columns), seen, number)

    @property
    def _rope(self) -> Any:
        return self._inside.get("position_embeddings")

    def _rotary(self, positions: Tensor) -> Any:
        states = self._given["inputs_embeds"]
        return self.decoder.rotary_emb(states, positions.to(states.device))

    def _mask(self, columns: Tensor) -> Tensor | None:
        mask = self._inside.get("attention_mask")
        if mask is None or mask.ndim != 4:
            return None
        mask = mask.expand(columns.shape[0], -1, -1, -1)
        rows = columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        short = mask.gather(2, rows)
        return short.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], columns.shape[1], -1)).contiguous()

    def _shortened(self) -> dict[str, Any]:
        """Return the arguments of the text model for the survivors of a cut at layer 0."""
        stage = self.stages[0]
        given = dict(self._given)
        states, positions = given["inputs_embeds"], given["position_ids"]
        given["inputs_embeds"] = states.gather(1, stage.take.expand(-1, -1, states.shape[-1]))
        index = stage.columns if positions.ndim == 2 else stage.columns.expand(positions.shape[0], -1, -1)
        given["position_ids"] = positions.expand(*positions.shape[:-2], *index.shape[-2:-1], -1).gather(-1, index)
        if self.repack:
            given["position_ids"] = torch.arange(stage.columns.shape[1], device=states.device)[None]
        given["attention_mask"] = None
        if given.get("visual_pos_masks") is not None:
            given["visual_pos_masks"] = stage.visual
            given["deepstack_visual_embeds"] = [rows[stage.number] for rows in given["deepstack_visual_embeds"]]
        return given

    def lengths(self, layers: int) -> list[int]:
        """Return the tokens on which each of the first `layers` layers runs."""
        reached = [[stage.columns.shape[1] for stage in self.stages if stage.layer <= n] for n in range(layers)]
        return [found[-1] if found else self.length for found in reached]

    def place_after(self, step: int) -> Tensor:
        """Return the position ids of one decode step, for a text model that was fed a short sequence."""
        now = self.after[..., step : step + 1]
        if not self.repack or self.short is None:
            return now
        return torch.full_like(now, self.stages[0].columns.shape[1] + step)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook the layers behind the cuts."""
        handles = []
        for number, layer in enumerate(self.decoder.layers):
            at = [i for i, stage in enumerate(self.stages) if stage.layer <= number]
            if not at or (self.short is not None and at[-1] == 0):
                continue
            hook = _Hook(self, at[-1], self.stages[at[-1]].layer == number)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        replaced = hasattr(self.decoder, "_deepstack_process") and self.short is None
        if replaced:
            self.decoder.__dict__["_deepstack_process"] = self._deepstack(self.decoder._deepstack_process)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if replaced:
                del self.decoder.__dict__["_deepstack_process"]

    def _deepstack(self, original: Any) -> Any:
        def process(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Any:
            stage = self.by_length.get(hidden_states.shape[1])
            if stage is None or hidden_states.shape[1] == self.length:
                return original(hidden_states, visual_pos_masks, visual_embeds)
            return original(hidden_states, stage.visual, visual_embeds[stage.number])

        return process


class _Hook:
    """The pre-hook of one decoder layer."""

    def __init__(self, oracle: Oracle, number: int, cuts: bool) -> None:
        self.oracle, self.number, self.cuts = oracle, number, cuts

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        oracle, stage = self.oracle, self.oracle.stages[self.number]
        hidden = args[0]
        kwargs["position_ids"] = None
        if hidden.shape[1] == 1:
            kwargs["attention_mask"] = None
            if oracle.repack:
                kwargs["position_embeddings"] = oracle._later[self.number][oracle.step]
            return args, kwargs
        if self.cuts:
            hidden = hidden.gather(1, stage.take.expand(-1, -1, hidden.shape[-1]))
        kwargs["position_embeddings"] = stage.rope
        kwargs["attention_mask"] = stage.mask
        return (hidden, *args[1:]), kwargs


def _rows(tables: Any, columns: Tensor) -> Any:
    """Take the survivors' rows of rotary tables (B or 1, T, d), or (3, B or 1, T, d) with an axis for each position."""
    out = []
    for table in tables:
        table = table.expand(*table.shape[:-3], columns.shape[0], -1, -1)
        index = columns[..., None].expand(*table.shape[:-2], columns.shape[1], table.shape[-1])
        out.append(table.gather(-2, index))
    return type(tables)(out)
