"""A rule without a model: run one step of a recipe on plain tensors, and see what it keeps and merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.errors import ConfigError, did_you_mean
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import Recipe, load_recipe
from mllm_squeeze.recipe.steps import Step
from mllm_squeeze.reducers.base import Among, DecodeReducer, Mix, Reducer, Reduction, Signals, VisualTokens
from mllm_squeeze.reducers.needs import Attention, EncoderAttention, Features, Need, Runs, Size, SoundAttention

# Signals whose tokens are their last axis; of all others they are the first one behind the spans.
_TOKENS_LAST = (Attention, EncoderAttention, Runs, Size, SoundAttention)


@dataclass(frozen=True)
class Choice:
    """What a rule chose.

    keep: bool (N,), or (S, N) for a batch, True for survivors.
    assign, weights, mix: who is merged into whom, as `Reduction` says it; None where nothing is merged.
    features: the survivors' states in order, float (n, D), or one such per span; None where no features were given.
    """

    keep: Tensor
    assign: Tensor | None = None
    weights: Tensor | None = None
    mix: Mix | None = None
    features: Tensor | tuple[Tensor, ...] | None = None

    @property
    def kept(self) -> Tensor | tuple[Tensor, ...]:
        """Int64 (n,), the survivors in ascending order, or one such per span."""
        if self.keep.ndim == 1:
            return self.keep.nonzero().flatten()
        return tuple(row.nonzero().flatten() for row in self.keep)


def choose(
    method: str | Path | Mapping[str, Any],
    /,
    *,
    features: Tensor | None = None,
    signals: Mapping[Need | str, Tensor] | None = None,
    text: Tensor | None = None,
    grid: Sequence[int] | Sequence[Tile] | None = None,
    mask: Tensor | None = None,
    at: str | None = None,
    stage: int = 0,
    before: int | Sequence[int] | None = None,
    modality: str | None = None,
    special_tokens: int = 0,
    among: int | Mapping[Need, Tensor] = 0,
    **params: Any,
) -> Choice:
    """Run one step of a method on plain tensors of one span, or of a batch of them, without a model.

    method: as for `apply`.
    features: states at the place of the cut, (N, D), or (S, N, D) for a batch.
    signals: what else the step reads, by the need (`Attention()`), or by its name ("attention", "encoder_attention",
        "projection.text") where the step has one of that name. `docs/signals.md` has names and shapes; leave out the
        axis S for one span.
    text: states of the words, (T, D) or (S, T, D).
    grid: (T, H, W) or (H, W), or the tiles of the span, whose separators stand among the tokens or not; rules that look
        at frames or neighbours need it.
    mask: bool (S, N) for a batch, False at padding.
    at: the place of the step ("projector", "layer 2"), where the recipe has several.
    stage: which cut of a step at several layers.
    before: tokens of the span before any cut, from which budgets count; N where nothing was cut before.
    modality: "image", "video" or "audio"; by default what the method reduces.
    special_tokens: special tokens of the encoder in front of the patches.
    among: where the visual tokens stand in signals that speak of all tokens: how many are in front of them, or int64
        (N,), or (S, N), for each need.
    params: what the recipe lets one set, such as `ratio` and `keep`.

    Raises:
        ConfigError: the recipe or a parameter is not valid; a signal is missing, unknown or of another length.
    """
    recipe = load_recipe(method, **params)
    number = _step_number(recipe, at)
    step = recipe.steps[number]
    rule = step.built
    if isinstance(rule, DecodeReducer):
        raise ConfigError(f"{step.where}: '{recipe.method}' acts at {step.at}, step by step; that takes a model.")
    batched = mask is not None or (features is not None and features.ndim == 3)
    given = _given(rule, features, signals or {}, text, batched)
    tokens = _tokens(recipe, number, given, mask, grid, stage, before, modality, special_tokens)
    tokens = _among_all(tokens, among)
    reduction = rule.reduce(tokens)
    states = _merged(given[Features()], reduction) if Features() in given else None
    if batched:
        return Choice(reduction.keep, reduction.assign, reduction.weights, reduction.mix, states)
    assign, weights = (None if x is None else x[0] for x in (reduction.assign, reduction.weights))
    return Choice(reduction.keep[0], assign, weights, reduction.mix, None if states is None else states[0])


def _step_number(recipe: Recipe, at: str | None) -> int:
    """Return the number of the one step at a place, of the only one where no place is named."""
    places = [str(step.at) for step in recipe.steps]
    found = [number for number, place in enumerate(places) if at in (None, place)]
    if len(found) == 1:
        return found[0]
    if at is not None and not found:
        raise ConfigError(f"'{recipe.method}' has no step at '{at}'. {did_you_mean(at, places)}")
    raise ConfigError(
        f"'{recipe.method}' has {len(found)} steps{f' at {at}' if at else ''}; `choose` runs one. Give at=, one of: "
        f"{', '.join(places)}."
    )


def _given(
    rule: Reducer, features: Tensor | None, signals: Mapping[Need | str, Tensor], text: Tensor | None, batched: bool
) -> Signals:
    """Return what was given, by need, with an axis of spans in front."""
    named = {_named(rule, key): value for key, value in signals.items()}
    for need, value in ((Features(), features), (Features("text"), text)):
        if value is not None:
            named[need] = value
    missing = [need for need in rule.needs() if need not in named]
    if missing:
        raise ConfigError(
            f"The step reads {', '.join(str(need) for need in missing)}, which is not given. Give it in signals= "
            "(features= and text= for states); docs/signals.md has the shapes."
        )
    return Signals({need: value if batched else value[None] for need, value in named.items()})


def _named(rule: Reducer, key: Need | str) -> Need:
    """Return the need of a rule that a key names."""
    if isinstance(key, Need):
        return key
    names: dict[str, list[Need]] = {}
    for need in rule.needs():
        names.setdefault(need.name, []).append(need)
    found = names.get(key, [])
    if not found:
        raise ConfigError(f"The step reads no signal '{key}'. {did_you_mean(key, names)}")
    if len(found) > 1:
        raise ConfigError(
            f"The step reads {len(found)} signals of the name '{key}'; give the need instead: "
            f"{', '.join(str(need) for need in found)}."
        )
    return found[0]


def _tokens(
    recipe: Recipe,
    number: int,
    given: Signals,
    mask: Tensor | None,
    grid: Sequence[int] | Sequence[Tile] | None,
    stage: int,
    before: int | Sequence[int] | None,
    modality: str | None,
    special_tokens: int,
) -> VisualTokens:
    step = recipe.steps[number]
    tiles = _tiles(grid)
    mask = _mask(given, mask, tiles)
    current = tuple(int(n) for n in mask.sum(1))
    lengths = (before,) * len(current) if isinstance(before, int) else tuple(before or current)
    asked = _asked(step, lengths, current, stage)
    text_mask = _text_mask(given)
    cells = torch.full((*mask.shape, 4), -1)
    if tiles and mask.shape[1] in (sum(tile.cells for tile in tiles), sum(tile.length for tile in tiles)):
        placed = [(n, *cell) for n, tile in enumerate(tiles) for cell in tile.coordinates()]
        separators = len(placed) == mask.shape[1]
        cells[:] = torch.tensor([cell if cell[1] >= 0 else (-1,) * 4 for cell in placed if separators or cell[1] >= 0])
    kinds = [kind for kind in ("image", "video", "audio") if kind in step.built.facts.modalities]
    return VisualTokens(
        mask=mask,
        budget=torch.tensor(asked, device=mask.device),
        counts=asked,
        grid=cells.to(mask.device),
        origin=torch.arange(mask.shape[1], device=mask.device).expand(mask.shape),
        lengths=lengths,
        current=current,
        tiles=(tiles,) * len(current),
        special_tokens=special_tokens,
        sample=tuple(range(len(current))),
        modality=(modality or kinds[0],) * len(current),
        links=((),) * len(current),
        signals=given,
        text_mask=text_mask,
        asked=bool(step.amount.given),
    )


def _among_all(tokens: VisualTokens, among: int | Mapping[Need, Tensor]) -> VisualTokens:
    """Return the tokens with where they stand among all, for the signals that speak of all."""
    found = {}
    for need, value in tokens.signals.items():
        if getattr(need, "of", "") != "all":
            continue
        given = among + tokens.origin if isinstance(among, int) else among.get(need)
        if given is None:
            raise ConfigError(f"{need} speaks of all tokens; say in among= where the visual ones stand in it.")
        place = given.expand(tokens.mask.shape)
        width = value.shape[1]
        if int(place.max()) >= width:
            raise ConfigError(
                f"{need} speaks of {width} tokens, and the visual ones are said to stand up to place "
                f"{int(place.max())}. Give among= as the number of tokens in front of them."
            )
        ones = torch.ones(len(place), width, dtype=torch.bool, device=place.device)
        found[need] = Among(ones.scatter(1, place, tokens.mask), place)
    return replace(tokens, among=found) if found else tokens


def _asked(step: Step, lengths: Sequence[int], current: Sequence[int], stage: int) -> tuple[int, ...]:
    stages = len(step.at.layers or (0,))
    if not 0 <= stage < stages:
        raise ConfigError(f"stage counts the cuts of a step from 0; this one has {stages}, got {stage}.")
    counts = [
        amount.of_prompt([length], stage, stages)[0]
        for amount, length in zip(step.amount.of_rows(len(lengths)), lengths, strict=True)
    ]
    return tuple(min(*pair) for pair in zip(counts, current, strict=True))


def _tiles(grid: Sequence[int] | Sequence[Tile] | None) -> tuple[Tile, ...]:
    if grid is None:
        return ()
    tiles = tuple(part for part in grid if isinstance(part, Tile))
    sides = tuple(part for part in grid if isinstance(part, int))
    if tiles and not sides:
        return tiles
    if tiles or len(sides) not in (2, 3):
        raise ConfigError(f"grid is (height, width), (frames, height, width) or a list of tiles; got {grid!r}.")
    return (Tile(*((1,) * (3 - len(sides))), *sides),)


def _mask(given: Signals, mask: Tensor | None, tiles: tuple[Tile, ...]) -> Tensor:
    """Return bool (S, N), the tokens that are there; every signal must speak of as many."""
    widths = {need: _width(need, value) for need, value in given.items() if not _of_words(need)}
    if mask is not None:
        widths[Features()] = mask.shape[1]
    number = next(iter(widths.values()), sum(tile.cells for tile in tiles))
    if not number or any(width != number for width in widths.values()):
        said = ", ".join(f"{need}: {width}" for need, width in widths.items()) or "nothing"
        raise ConfigError(f"All signals speak of the same tokens; got {said}. Give features=, signals= or grid=.")
    spans = next((len(value) for value in given.values()), 1)
    return torch.ones(spans, number, dtype=torch.bool) if mask is None else mask.bool()


def _of_words(need: Need) -> bool:
    """True where a signal has a number or a vector for each word, or for all tokens, not for each visual one."""
    return getattr(need, "of", "visual") == "all" or "text" in (
        getattr(need, "of", "visual"),
        getattr(need, "columns", "visual"),
    )


def _width(need: Need, value: Tensor) -> int:
    return int(value.shape[-1] if isinstance(need, _TOKENS_LAST) else value.shape[1])


def _text_mask(given: Signals) -> Tensor | None:
    words = [
        (value, _width(need, value))
        for need, value in given.items()
        if _of_words(need) and getattr(need, "of", "") != "all"
    ]
    if words:
        value, width = words[0]
        return torch.ones(len(value), width, dtype=torch.bool, device=value.device)
    read = [need for need in given if need.reads_text]
    # Words whose rows were read elsewhere: how many there are does not matter to the rule.
    return torch.ones(len(given[read[0]]), 1, dtype=torch.bool) if read else None


def _merged(states: Tensor, reduction: Reduction) -> tuple[Tensor, ...]:
    """Return the survivors' states of each span, in order."""
    return tuple(row[keep] for row, keep in zip(reduction.states(states), reduction.keep, strict=True))
