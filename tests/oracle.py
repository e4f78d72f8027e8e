"""Independent proofs: what a squeezed model must answer, computed by the dense model with hooks; imports no engine.

A cut is described by anything with `layer` and `kept` (kept[b] = ascending columns of the padded prompt of sample b
that are still seen from that layer on). The dense model closes the other columns by masks, so its shapes never change.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

import cache_role

Inputs = Mapping[str, Tensor]
TOLERANCE = 1e-5
# Families whose generate() hands no logits processor on.
DROPS_PROCESSORS = ("janus",)
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


class CutLike(Protocol):
    """One step of a squeeze."""

    @property
    def layer(self) -> int:
        """First layer that runs short."""

    @property
    def kept(self) -> list[Tensor]:
        """Columns that each sample keeps."""


@dataclass(frozen=True)
class Drop:
    """A cut that a test makes up."""

    layer: int
    kept: list[Tensor]


@dataclass
class Steps:
    """Logits of the prefill (B, T, V), of each decode step (B, n, V), and the cache that the run left."""

    prefill: Tensor
    decode: Tensor
    cache: Any = field(default=None, repr=False)


def text_model(model: Any) -> Any:
    """Return the module that holds the decoder layers."""
    found = getattr(model, "get_base_model", lambda: model)().get_decoder()
    while not (hasattr(found, "layers") and hasattr(found, "embed_tokens")):
        found = next(getattr(found, name) for name in ("language_model", "model", "decoder") if hasattr(found, name))
    return found


def forced_tokens(batch: int, steps: int, seed: int = 7) -> Tensor:
    """Return plain text tokens (B, n) that both runs are fed, so that their logits compare step by step."""
    return torch.randint(40, 95, (batch, steps), generator=torch.Generator().manual_seed(seed))


def positions(model: Any, inputs: Inputs, steps: int) -> Tensor:
    """Return position_ids of the prompt and of `steps` more tokens: (B, T + n), or (3, B, T + n) with M-RoPE."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    inner = getattr(model, "get_base_model", lambda: model)().model
    after = torch.arange(steps, device=mask.device) + mask.sum(-1, keepdim=True)
    if not hasattr(inner, "get_rope_index"):
        return torch.cat([(mask.cumsum(-1) - 1).clamp(min=0), after], -1)
    names = (
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    prompt, delta = inner.get_rope_index(**{k: inputs[k] for k in names if k in inputs})
    return torch.cat([prompt, (after + delta).expand(3, -1, -1)], -1)


@torch.no_grad()
def run(model: Any, inputs: Inputs, forced: Tensor, cache: Any = None, **extra: Any) -> Steps:
    """Prefill, then decode the forced tokens (B, n) with a cache and explicit position_ids; works with any padding."""
    width, steps = inputs["input_ids"].shape[1], forced.shape[1]
    where = positions(model, inputs, steps)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    out = model(**inputs, position_ids=where[..., :width], **cache_role.given(cache), use_cache=True, **extra)
    prefill, decode = out.logits, []
    for t in range(steps):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)
        at = where[..., width + t : width + t + 1]
        token = forced[:, t : t + 1]
        out = model(input_ids=token, attention_mask=mask, position_ids=at, **cache_role.behind(out))
        decode.append(out.logits[:, -1])
    logits = torch.stack(decode, 1) if decode else prefill[:, :0]
    return Steps(prefill, logits, cache_role.of_output(out))


class _Force(LogitsProcessor):
    def __init__(self, forced: Tensor, width: int) -> None:
        self.forced, self.width = forced, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        if step >= self.forced.shape[1]:
            return scores
        forced = self.forced.repeat_interleave(scores.shape[0] // self.forced.shape[0], 0)
        return torch.full_like(scores, -1e9).scatter(1, forced[:, step : step + 1], 0.0)


def force(forced: Tensor, width: int) -> LogitsProcessorList:
    """Return the processor that makes generate choose the forced tokens (B, n) behind a prompt of this width."""
    return LogitsProcessorList([_Force(forced, width)])


def forcing(model: Any, forced: Tensor, width: int) -> dict[str, Any]:
    """Return the argument that makes generate() choose the forced tokens (B, n) behind a prompt of this width."""
    if model.config.model_type not in DROPS_PROCESSORS:
        return {"logits_processor": force(forced, width)}

    def allowed(row: int, ids: Tensor) -> list[int]:
        step = ids.shape[-1] - width
        return (
            [int(forced[row, step])]
            if step < forced.shape[1]
            else list(range(model.config.get_text_config().vocab_size))
        )

    return {"prefix_allowed_tokens_fn": allowed}


@torch.no_grad()
def generate(model: Any, inputs: Inputs, forced: Tensor, **extra: Any) -> Tensor:
    """Return the raw logits (B, n + 1, V) of `model.generate` while it is made to choose the forced tokens (B, n)."""
    choose = forcing(model, forced, inputs["input_ids"].shape[1])
    settings = {"max_new_tokens": forced.shape[1] + 1, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **choose, **settings, **extra)
    return torch.stack(out.logits, 1)


class _Pass:
    """Where the call of the text model that runs now stands: tokens seen before it, and its own; a hook keeps it."""

    def __init__(self) -> None:
        self.past = self.width = 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_role.of_call(kwargs)
        self.past = 0 if cache is None else cache.get_seq_length()
        states = kwargs.get("inputs_embeds")
        self.width = (kwargs["input_ids"] if states is None else states).shape[1]


class _Mask:
    """The pre-hook of one decoder layer of the dense model."""

    def __init__(self, model: Any, index: int, width: int, cut: CutLike, now: _Pass) -> None:
        self.text, self.index, self.width, self.cut, self.now = text_model(model), index, width, cut, now
        self.compact: Tensor | None = None
        self.repack = False
        self.closed = torch.ones(len(cut.kept), width, dtype=torch.bool)
        self.rank = torch.zeros(len(cut.kept), width, dtype=torch.long)
        for b, kept in enumerate(cut.kept):
            self.closed[b, kept] = False
            self.rank[b, kept] = torch.arange(len(kept))
        self.count = torch.tensor([len(k) for k in cut.kept])

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, kwargs = args[0], dict(kwargs)
        # Layers that borrow their keys may run on the last tokens only.
        total = self.now.past + self.now.width
        rows = torch.arange(total - hidden.shape[-2], total)
        if self.now.past == 0 and self.compact is not None:
            hidden = self._write(hidden)
        allowed = self._allowed(kwargs.get("attention_mask"), hidden, rows, total)
        if self.text.config._attn_implementation == "eager":
            allowed = torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
        kwargs["attention_mask"] = allowed
        # A layer without positions gets no tables, whatever the others get.
        if self.repack and kwargs["position_embeddings"] is not None:
            kwargs["position_embeddings"] = rotary(self.text, self.index, hidden, self._places(hidden, rows))
        return (hidden, *args[1:]), kwargs

    def _rows(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Repeat rows as generate does for beams."""
        return x.repeat_interleave(hidden.shape[-3] // x.shape[0], 0)

    def _allowed(self, mask: Tensor | None, hidden: Tensor, rows: Tensor, total: int) -> Tensor:
        # A sliding layer holds the last tokens only.
        seen = total if mask is None else min(mask.shape[-1], total)
        column = torch.arange(total - seen, total)
        if mask is None:
            allowed = (column[None] <= rows[:, None])[None, None]
        else:
            allowed = mask if mask.dtype == torch.bool else mask == 0
            allowed = allowed[..., :seen]
        allowed = allowed.expand(hidden.shape[-3], 1, len(rows), seen)
        closed = self._rows(self.closed, hidden)[:, column.clamp(max=self.width - 1)] & (column < self.width)
        # A closed row sees itself: a row that sees nothing would be NaN.
        return (allowed & ~closed[:, None, None]) | (rows[:, None] == column[None])

    def _places(self, hidden: Tensor, rows: Tensor) -> Tensor:
        rank, count = self._rows(self.rank, hidden), self._rows(self.count, hidden)
        inside = rank[:, rows.clamp(max=self.width - 1)]
        return torch.where(rows < self.width, inside, count[:, None] + rows - self.width)

    def _write(self, hidden: Tensor) -> Tensor:
        assert self.compact is not None
        hidden = hidden.clone()
        for b, kept in enumerate(self.cut.kept):
            hidden[..., b, kept, :] = self.compact[..., b, : len(kept), :]
        return hidden


def rotary(text: Any, index: int, hidden: Tensor, places: Tensor) -> Any:
    """Return the rotary tables of one layer at these positions (B, T), as the text model makes them for it."""
    if "layer_type" in inspect.signature(text.rotary_emb.forward).parameters:
        return text.rotary_emb(hidden, places, text.config.layer_types[index])
    if getattr(text, "rope_types", None) is not None and text.rope_types[index] == "unscaled":
        return text.rotary_emb_unscaled(hidden, places)
    return text.rotary_emb(hidden, places)


def recurrent(model: Any) -> list[int]:
    """Return the numbers of the layers that mix tokens without attention: no mask takes a token out of them."""
    kinds = getattr(text_model(model).config, "layer_types", None) or []
    return [n for n, kind in enumerate(kinds) if "attention" not in kind or "linear" in kind]


@contextmanager
def masked(
    model: Any,
    width: int,
    cuts: Sequence[CutLike],
    compact: Mapping[int, Tensor] | None = None,
    repack: bool = False,
) -> Iterator[None]:
    """Make the dense model close, from layer k of each cut on, every column of the prompt (width) that was dropped.

    compact: by layer, the states (B, M, D) that the squeezed run had right behind the cut at this layer; they are
    written into the kept rows (for methods that merge). repack: behind a cut, survivors stand at consecutive positions.
    """
    ordered = sorted(cuts, key=lambda c: c.layer)
    now = _Pass()
    handles = [text_model(model).register_forward_pre_hook(now, with_kwargs=True)]
    for i, layer in enumerate(text_model(model).layers):
        active = [c for c in ordered if c.layer <= i]
        if not active:
            continue
        hook = _Mask(model, i, width, active[-1], now)
        hook.compact, hook.repack = (compact or {}).get(i), repack
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Drop:
    """The pre-hook of one decoder layer of a dense model that runs once, without a cache, on rows that are left."""

    def __init__(self, model: Any, index: int, before: Tensor, after: Tensor, repack: bool) -> None:
        self.text, self.index, self.after, self.repack = text_model(model), index, after, repack
        self.compact: Tensor | None = None
        # Places, in the sequence of the layer before, of what this layer gets.
        self.take = torch.searchsorted(before, after)

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs, after = dict(kwargs), self.after
        hidden = args[0][..., self.take, :]
        if self.compact is not None:
            hidden = torch.cat([self.compact, hidden[:, self.compact.shape[1] :]], 1)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = mask[:, after] if mask.ndim == 2 else mask[:, :, after][..., after]
        if kwargs.get("position_embeddings") is None:
            pass
        elif self.repack:
            places = torch.arange(len(after))[None]
            kwargs["position_embeddings"] = rotary(self.text, self.index, hidden, places)
        else:
            kwargs["position_embeddings"] = tuple(t[..., after, :] for t in kwargs["position_embeddings"])
        kwargs["position_ids"] = None
        return (hidden, *args[1:]), kwargs


@torch.no_grad()
def dropped_logits(
    model: Any,
    inputs: Inputs,
    cuts: Sequence[CutLike],
    repack: bool = False,
    compact: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Return the logits (1, M, V) of one prompt of which the rows that were cut really leave; text may stand behind.

    The cuts may be those of a shorter prompt: what follows it stays. No cache: all layers see the whole sequence, so
    that layers without attention can be proved as well. compact: as for `masked`.
    """
    width = inputs["input_ids"].shape[1]
    handles, now = [], torch.arange(width)
    ordered = sorted(cuts, key=lambda c: c.layer)
    end = {c.layer: int(c.kept[0][-1]) + 1 for c in cuts}
    for i, layer in enumerate(text_model(model).layers):
        active = [c for c in ordered if c.layer <= i]
        if not active:
            continue
        cut = active[-1]
        after = torch.cat([cut.kept[0], torch.arange(end[cut.layer], width)])
        hook = _Drop(model, i, now, after, repack)
        hook.compact = (compact or {}).get(i)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        now = after
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def masked_logits(
    model: Any,
    inputs: Inputs,
    cuts: Sequence[CutLike],
    forced: Tensor,
    compact: Mapping[int, Tensor] | None = None,
    repack: bool = False,
) -> Steps:
    """Return the logits of the dense model with the dropped columns closed: prefill and the forced decode steps."""
    with masked(model, inputs["input_ids"].shape[1], cuts, compact, repack):
        return run(model, inputs, forced)


@torch.no_grad()
def plain_logits(model: Any, embeds: Tensor, forced: Tensor) -> Steps:
    """Return the logits of the text model alone, fed embeddings (1, M, D) at positions 0..M-1, then the tokens."""
    base = getattr(model, "get_base_model", lambda: model)()
    text, head, embed = text_model(model), base.get_output_embeddings(), base.get_input_embeddings()
    out = text(inputs_embeds=embeds, use_cache=True)
    prefill, decode = head(out.last_hidden_state), []
    for t in range(forced.shape[1]):
        out = text(inputs_embeds=embed(forced[:, t : t + 1]), **cache_role.behind(out), use_cache=True)
        decode.append(head(out.last_hidden_state[:, -1]))
    return Steps(prefill, torch.stack(decode, 1), cache_role.of_output(out))


@contextmanager
def capture(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states that these decoder layers get in their first call; enter it after apply()."""
    seen: dict[int, Tensor] = {}
    handles = []
    for k in layers:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], k: int = k) -> None:
            if k not in seen:
                seen[k] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        handles.append(text_model(model).layers[k].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def leading(states: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Return states (B, M, D) behind a cut, whose shorter rows are padded in front, with the padding behind."""
    return torch.stack([row.roll(len(mine), 0) for row, mine in zip(states, kept, strict=True)])


def survivors(inputs: Inputs, cuts: Sequence[CutLike]) -> Tensor:
    """Bool (B, T): the columns that the last layer still sees; without cuts all but the padding."""
    ids = inputs["input_ids"]
    alive = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    for cut in cuts:
        for b, kept in enumerate(cut.kept):
            here = torch.zeros(ids.shape[1], dtype=torch.bool)
            here[kept] = True
            alive[b] &= here
    return alive


def gap(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; shapes must agree."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0


def assert_close(a: Tensor, b: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Fail when the tensors differ by more than the tolerance, or hold a NaN."""
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), f"{what}: not finite"
    difference = gap(a, b)
    assert difference <= tolerance, f"{what}: largest difference {difference:.2e} > {tolerance:.0e}"


def assert_steps(squeezed: Steps, expected: Steps, inputs: Inputs, cuts: Sequence[CutLike], what: str = "") -> None:
    """Fail unless the logits of all survivors and of all decode steps agree."""
    assert squeezed.prefill.shape == expected.prefill.shape, (
        f"{what} prefill logits have shape {squeezed.prefill.shape}"
    )
    alive = survivors(inputs, cuts)
    assert_close(squeezed.prefill[alive], expected.prefill[alive], f"{what} prefill")
    for t in range(expected.decode.shape[1]):
        assert_close(squeezed.decode[:, t], expected.decode[:, t], f"{what} decode step {t}")
