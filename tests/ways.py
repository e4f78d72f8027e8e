"""How a method works, read from its recipe and the reducers of its steps; and one method for each way of working.

What a contract proves (masks, positions, caches, batches, removal) hangs on the way and not on the name, so contracts
run on one method per way. Nothing here knows a method: a new recipe joins by being there, one of another package or of
a test by being registered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mllm_squeeze as squeeze
from mllm_squeeze import registry
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import Recipe, load_recipe, resolve_steps
from mllm_squeeze.recipe.steps import At, Step
from mllm_squeeze.reducers.base import Reducer
from mllm_squeeze.reducers.needs import Features, Need, Sensitivity, SoundAttention
from tiny.parts import LAYERS

# Where several methods work in one way, the first of these stands for it, else the first by name. Only tests that read
# better with a well-known method care.
PREFERRED = ("divprune", "fastv", "pyramiddrop", "sparsevlm", "visionzip", "random", "vidcom2", "dycoke", "tome")
# A grid on which a rule that keeps its budget to the token can be told from one that counts in another way.
_PROBE = (Tile(8, 4, 4),)
# Methods of several cuts leave some tokens for the last of them.
ONE_CUT, SEVERAL_CUTS = 0.5, 0.75
# Of a first step that could decide by itself.
FIRST_CUT = 0.2


@dataclass(frozen=True, order=True)
class Way:
    """What the engine does for one method and not for another.

    places: of each step, where it acts: "encoder", "keys", "before" (the LLM), "layer", "layers", "cache". merges:
    survivors carry what was assigned to them. repacks: survivors are renumbered, where positions have one axis. counts:
    "budget" is kept to the token, "known" follows from grid and budget, "measured" from the content, "decided" without
    a budget. roads: how signals come to the rule: from the layer before the cut ("layer") or behind it ("next layer"),
    or numbered otherwise ("other layers"), from rows that the rule picks ("chosen rows"), from the vision encoder
    ("encoder"), by runs of the projector ("pushes"), "text", and what else a need is called. reduces: "all",
    "pictures" (no sound), or the one modality there is. separators: "compete", "keep" or "drop".
    """

    places: tuple[str, ...]
    merges: bool
    repacks: bool
    counts: str
    roads: tuple[str, ...]
    reduces: str
    separators: str


@dataclass(frozen=True)
class Method:
    """A method as the tests apply it: its way, and parameters for a model of few layers.

    nothing: parameters at which it removes nothing, empty where there are none. decodes: it goes on cutting while
    decoding. modalities: what it reduces.
    """

    name: str
    way: Way
    params: dict[str, Any] = field(hash=False)
    modalities: tuple[str, ...]
    nothing: dict[str, float] = field(hash=False)

    @property
    def merges(self) -> bool:
        """Say whether survivors carry merged states."""
        return self.way.merges

    @property
    def wants_text_encoder(self) -> bool:
        """Say whether the user has to give a text encoder."""
        return bool(squeeze.describe(self.name)["facts"]["text_encoder"])

    @property
    def space(self) -> str:
        """The kind of text encoder that it takes: one that pools pictures, or projects patches."""
        needs = [need for step in self.recipe().steps for need in step.built.needs()]
        return "siglip" if any(getattr(need, "pooled", False) for need in needs) else "clip"

    @property
    def decodes(self) -> bool:
        """Say whether it goes on cutting while decoding."""
        return "cache" in self.way.places

    @property
    def exact(self) -> bool:
        """Say whether a span keeps its budget to the token, and no separators beside it."""
        return self.way.counts == "budget" and "encoder" not in self.way.places and self.way.separators != "keep"

    def recipe(self, **changes: Any) -> Recipe:
        """Return its recipe with the parameters of the tests, changed by `changes`."""
        return load_recipe(self.name, **changed(self.params, changes))


def changed(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with changes; keep takes the place of ratio."""
    out = params | changes
    if "keep" in changes:
        out.pop("ratio", None)
    return out


def method(name: str) -> Method:
    """Return what the tests know of a method, shipped or registered, from its recipe alone."""
    return _method(name, repr(registry.method_source(name)))


@cache
def _method(name: str, source: str) -> Method:
    recipe = load_recipe(name)
    budgeted = bool({"ratio", "keep"} & set(recipe.params))
    cuts = sum(len(step.at.layers or (0,)) for step in recipe.steps if _cuts(step))
    params: dict[str, Any] = _shallow(recipe)
    if recipe.params.get("first", 0) is None:
        # Where the first step says itself how much it leaves, it might leave nothing to a later one.
        params["first"] = FIRST_CUT
    if budgeted:
        params = _with_ratio(name, params, SEVERAL_CUTS if cuts > 1 else ONE_CUT)
    recipe = load_recipe(name, **params)
    modalities = tuple(squeeze.describe(name)["facts"]["modalities"])
    return Method(name, way_of(recipe, modalities), params, modalities, _nothing(recipe))


def _with_ratio(name: str, params: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Return parameters with a ratio; the recipe's own where its other steps leave no room for this one."""
    try:
        load_recipe(name, **params, ratio=ratio)
    except ConfigError:
        return params
    return params | {"ratio": ratio}


def _nothing(recipe: Recipe) -> dict[str, float]:
    """Return the parameters at which no step removes anything; none where a step says itself how much it leaves."""
    written = [entry.get("ratio") for step, entry in zip(recipe.steps, recipe.raw["steps"], strict=True) if _cuts(step)]
    names = [name for name in recipe.params if "${" + name + "}" in written]
    whole = all(isinstance(value, str) and value[2:-1] in names for value in written)
    return dict.fromkeys(names, 0.0) if whole else {}


def _cuts(step: Step) -> bool:
    return step.at.place != "cache"


def _shallow(recipe: Recipe) -> dict[str, Any]:
    """Return the parameters that name layers which a model of few layers lacks, made smaller.

    A cut at the last layer shows least, so what names one layer names the third. What looks back looks at one block.
    """
    out: dict[str, Any] = {}
    for name, value in recipe.params.items():
        if name.endswith("blocks"):
            out[name] = 1
        if "layer" not in name:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > LAYERS - 2:
            out[name] = LAYERS - 2
        elif isinstance(value, (list, tuple)) and any(isinstance(v, int) and v >= LAYERS for v in value):
            out[name] = sorted({n * (LAYERS - 1) // len(value) + 1 for n in range(len(value))})
        elif isinstance(value, (list, tuple)) and len(value) >= LAYERS:
            out[name] = list(range(1, LAYERS))
    # A row of cuts in front of a last one ends in front of it.
    if any(isinstance(value, list) for value in out.values()):
        out |= {k: LAYERS - 1 for k, v in recipe.params.items() if "layer" in k and isinstance(v, float)}
    last = min((value for name, value in out.items() if "layer" in name and isinstance(value, int)), default=LAYERS)
    return {k: [n for n in v if n < last] if isinstance(v, list) else v for k, v in out.items()}


def way_of(recipe: Recipe, modalities: Sequence[str]) -> Way:
    """Return the way in which a recipe works."""
    reducers = [step.built for step in recipe.steps]
    acting = [(r, step) for r, step in zip(reducers, recipe.steps, strict=True) if _cuts(step)]
    separators = {r.separators for r, _ in acting} - {"compete"}
    pictures = tuple(modalities) == ("image", "video")
    return Way(
        places=tuple(_place(step.at) for step in recipe.steps),
        merges=any(r.facts.merges for r in reducers),
        repacks=recipe.positions == "repack",
        counts=max((_counts(r, step) for r, step in acting), key=_COUNTS.index),
        roads=tuple(sorted({road for r in reducers for road in roads(r)})),
        reduces="all" if len(modalities) == 3 else "pictures" if pictures else " ".join(modalities),
        separators=" ".join(sorted(separators)) or "compete",
    )


_COUNTS = ("budget", "known", "measured", "decided")


def _place(at: At) -> str:
    if at.place == "projector" or at.layer == 0:
        return "keys" if at.keys else "before"
    return "layers" if at.layers is not None else str(at.place)


def _counts(reducer: Reducer, step: Step) -> str:
    if reducer.facts.decides and not step.amount.given:
        return "decided"
    if not reducer.facts.known_count:
        return "measured"
    cells = _PROBE[0].cells
    asked = range(cells // 2, cells + 1, 7)
    return "budget" if all(reducer.count(cells, n, _PROBE) == n for n in asked) else "known"


def roads(reducer: Reducer) -> Iterable[str]:
    """Return how the signals come to a reducer; what stands at the cut anyway takes no road."""
    if reducer.facts.reads_text:
        yield "text"
    for need in reducer.needs():
        if not isinstance(need, Features):
            yield road(need)
        if getattr(need, "rows", "") == "cls" or getattr(need, "cls", False):
            yield "cls"


def road(need: Need) -> str:
    """Return how one signal comes, by the words in which needs are written."""
    if isinstance(need, Sensitivity):
        return "pushes"
    if need.reads_encoder:
        return "encoder"
    if isinstance(need, SoundAttention):
        return "sound"
    if getattr(need, "rows", "") == "chosen":
        return "chosen rows"
    block = getattr(need, "block", None)
    if block == "next":
        return "next layer"
    if block is not None and block != -1:
        return "other layers"
    return "layer" if need.places <= {"encoder", "layer"} else type(need).__name__.lower()


def shipped() -> tuple[str, ...]:
    """Return the names of the methods that ship."""
    return tuple(sorted(path.stem for path in registry.configs_dir().glob("*.yaml")))


def first(names: Iterable[str]) -> str:
    """Return the method that stands for several: the first that is preferred, else the first by name."""
    order = {name: n for n, name in enumerate(PREFERRED)}
    return min(names, key=lambda name: (order.get(name, len(order)), name))


def by_way(names: Iterable[str]) -> dict[Way, list[str]]:
    """Return the methods of each way."""
    out: dict[Way, list[str]] = {}
    for name in names:
        out.setdefault(method(name).way, []).append(name)
    return dict(sorted(out.items()))


def representatives(names: Iterable[str]) -> tuple[str, ...]:
    """Return one method per way, sorted by name."""
    return tuple(sorted(first(group) for group in by_way(names).values()))


def pick(*places: str, names: Iterable[str] | None = None, **facts: Any) -> str:
    """Return the first representative that acts at these places and whose way says these facts.

    Raises:
        LookupError: no method does; a test that asks for it would prove nothing.
    """
    among = representatives(shipped()) if names is None else names
    found = [
        name
        for name in among
        if method(name).way.places == places and all(getattr(method(name).way, k) == v for k, v in facts.items())
    ]
    if not found:
        raise LookupError(f"no method acts at {places} with {facts}")
    return first(found)


@dataclass(frozen=True)
class Count:
    """How many tokens of one span must be left: `tokens`, or as many more or less as `slack` says."""

    tokens: int
    slack: int = 0


def left_of(m: Method, span: Any, before: int | None = None, **changes: Any) -> Count | None:
    """Return what the last cut must leave of a span; None where only the rule knows.

    before: tokens of the span in front of the last cut, all where there was one. A rule whose count follows from the
    content shares its budget over frames in whole tokens, so it may miss it by one per frame. In the encoder the budget
    holds for the patches of each tile, to the token where a tile is a span.

    Raises:
        ConfigError: what the rule says of a budget that it cannot keep.
    """
    recipe = m.recipe(**changes)
    step = [step for step in recipe.steps if _cuts(step)][-1]
    reducer = step.built
    if _counts(reducer, step) == "decided":
        return None
    beside = span.length - sum(tile.cells for tile in span.tiles) if span.tiles else 0
    whole = span.length - (beside if reducer.separators == "keep" else 0)
    (unit, asked), *rows = step.amount.left
    assert unit != "tokens per prompt" and not rows, f"{step.amount}: no budget of one span"
    budget = kept_of(whole, asked)
    apart = beside if reducer.separators == "keep" else 0
    if step.at.place == "encoder":
        return Count(budget, 0 if len(span.tiles) == 1 and not beside else whole // 4)
    if not reducer.facts.known_count:
        return Count(budget + apart, sum(tile.frames for tile in span.tiles)) if span.tiles else None
    current = whole if before is None else before - apart
    return Count(reducer.count(current, budget, span.tiles) + apart)


def kept_of(length: int, keep: float) -> int:
    """Return the tokens that stay of `length`, worked out anew: rounded half up, at least one, at most all."""
    return min(keep, length) if isinstance(keep, int) else max(1, math.floor(round(length * keep, 9) + 0.5))


def refuses(m: Method, span: Any, **changes: Any) -> bool:
    """Say whether the rule itself cannot keep this budget of a span, so that it must say so."""
    try:
        left_of(m, span, **changes)
        step = [step for step in m.recipe(**changes).steps if _cuts(step)][-1]
    except ConfigError:
        return True
    if not step.amount.counts_tokens:
        return False
    whole = sum(tile.cells for tile in span.tiles) or span.length
    (_, asked), *_ = step.amount.left
    return asked < min(step.built.fewest(whole, span.tiles), whole)


def cut_layers(m: Method, layers: int) -> list[tuple[int, Reducer]]:
    """Return (layer, reducer) of each cut at the input of a decoder layer; the layer that decoding reads counts too."""
    recipe = m.recipe()
    out = []
    for step, where in zip(recipe.steps, resolve_steps(recipe, layers), strict=True):
        reducer = step.built
        if step.at.place == "cache":
            where = (getattr(reducer, "layer", 0),)
        if step.at.place != "encoder":
            out += [(layer, reducer) for layer in where]
    return out
