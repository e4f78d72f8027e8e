"""A canary for releases that nobody has tried: cuts of a small stand-in, with all that decoding does, against masking.

It is the code of transformers that changed, not the user's weights; so a text model of the same class with few layers
and random weights tells, in a second or less, whether a cut is still what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from mllm_squeeze.checking.prompt import BEFORE, LENGTH, SIDE, TrialPrompt, layer_to_cut, trial_prompt
from mllm_squeeze.checking.runs import PREFILL, STEPS, Run, dense_states, expected_states, running
from mllm_squeeze.checking.small import first_line, small_parts
from mllm_squeeze.engine.hooks import self_check as selfcheck
from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.plan import Plan, PlannedCut
from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.family.structure import ModelParts, find_attention, find_pre_norm
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Block, Need, Place
from mllm_squeeze.upstream.attention import using
from mllm_squeeze.upstream.caches import CROPS_STATIC

# Relative error that rounding alone explains in float32.
_TOLERANCE = 1e-4
# Masking must change this many times more than that, or equality says nothing.
_MATTERS = 3


@dataclass(frozen=True)
class Case:
    """One way to run a cut.

    implementation: of attention. layer: first that runs short. repack: survivors are renumbered. rows: of the batch,
    the second padded on the left. static: the cache has a fixed size.
    """

    implementation: str
    layer: int
    repack: bool
    rows: int
    static: bool = False

    def __str__(self) -> str:
        batch = "one prompt" if self.rows == 1 else "a padded batch"
        positions = "new" if self.repack else "old"
        cache = "a static cache" if self.static else "a growing cache"
        return f"{self.implementation}, layer {self.layer}, {batch}, {positions} positions, {cache}"


def cases_of(parts: ModelParts) -> list[Case]:
    """Return the ways in which a text model can be run."""
    repacks = [False] if parts.mrope or parts.kv_sources or parts.rotary is None else [False, True]
    ways = [how for how in ("sdpa", "eager") if _runs(parts, how)]
    if not ways:
        return []
    # Without a mask, a text model that looks both ways sees tokens in one pass that decoding has yet to bring.
    batches = (1, 2) if all(parts.is_causal(n) for n in range(len(parts.layers))) else (2,)
    inner = layer_to_cut(parts)
    found = [Case(how, inner, repack, rows) for how in ways for repack in repacks for rows in batches]
    # Where all layers hold the same entries, decode steps take a way of their own.
    found += [Case(ways[0], 0, repack, rows) for repack in repacks for rows in batches if inner]
    plain = all(parts.has_entries(n) and parts.window(n) is None for n in range(len(parts.layers)))
    if plain and not parts.kv_sources:
        found += [Case(ways[0], inner, repack, rows, static=True) for repack in repacks for rows in batches]
    return found


def _runs(parts: ModelParts, implementation: str) -> bool:
    """Return whether the dense text model runs with an attention implementation; some cannot do with SDPA."""
    try:
        with torch.no_grad(), using(parts.text_config, implementation):
            dense_states(parts, trial_prompt(parts))
    # What a text model says where it is not made for an implementation differs from class to class.
    except Exception:
        return False
    return True


@dataclass(frozen=True)
class Verdict:
    """What the canary of a class of text models said.

    broken: what is not exact, in words. why_not: why it did not run, "" where it did.
    """

    broken: tuple[str, ...] = ()
    why_not: str = ""

    @property
    def ran(self) -> bool:
        """True where a stand-in ran."""
        return not self.why_not


_verdicts: dict[Any, Verdict] = {}


def decoding_of(parts: ModelParts) -> Verdict:
    """Return whether cuts of a small text model of a model's class decode exactly; tried once per process."""
    kinds = frozenset(kind.word for kind in parts.kinds)
    key = (type(parts.decoder), kinds, parts.mrope, bool(parts.kv_sources))
    if key not in _verdicts:
        small = small_parts(parts)
        _verdicts[key] = (
            Verdict(why_not=small.why_not) if small.parts is None else Verdict(tuple(broken_ways(small.parts)))
        )
    return _verdicts[key]


def broken_ways(parts: ModelParts) -> list[str]:
    """Return what goes wrong where cuts of a small text model are decoded, in words; nothing where all is exact.

    parts: of a text model alone, in float32 on the CPU.
    """
    cases = cases_of(parts)
    found = [] if cases else ["the text model runs neither with sdpa nor with eager attention"]
    with torch.no_grad():
        for case in cases:
            wrong = _guarded(lambda case=case: _decoding(parts, case))
            found += [f"{case}: {wrong}"] if wrong else []
        for what, check in (("a preview beside a filled cache", _preview), ("rows of a cache", _rows)):
            wrong = _guarded(lambda check=check: check(parts))
            found += [f"{what}: {wrong}"] if wrong else []
    return found


def _guarded(check: Any) -> str | None:
    """Return what a check says; the code of a release that nobody tried may raise anything."""
    try:
        found: str | None = check()
    except Exception as error:
        return first_line(error)
    return found


# A cut, decoded


def _decoding(parts: ModelParts, case: Case) -> str | None:
    """Prefill, decode, and compare the states of survivors and of each step with those of one masked pass."""
    prompt, layer = trial_prompt(parts, case.rows), case.layer
    plan = Plan((selfcheck.probe_cut(layer),), repack=case.repack)
    with using(parts.text_config, case.implementation), running(parts, plan) as attachment:
        run = Run(parts, attachment, plan, prompt, case.static)
        run.prefill()
        for column in range(PREFILL, LENGTH):
            run.step(column)
        wrong = _cache_wrong(run, layer) or _crop_wrong(run, layer)
    if wrong:
        return wrong
    with using(parts.text_config, case.implementation):
        expected, dense = expected_states(parts, run, layer, case.repack), dense_states(parts, prompt)
    kept = run.kept()
    ours, theirs = torch.cat(run.states, 1)[kept], expected[kept]
    error = selfcheck.distance(ours, theirs)
    if not error <= _TOLERANCE:
        steps = [selfcheck.distance(state, expected[:, PREFILL + n, None]) for n, state in enumerate(run.states[1:])]
        words = ", ".join(f"{step:.0e}" for step in steps)
        return f"a cut differs from masking the same tokens by {error:.1e} (decode steps: {words})"
    if not selfcheck.distance(dense[kept], theirs) > _MATTERS * error:
        return f"masking tokens changes nothing that could be told from rounding ({error:.1e})"
    return None


def _cache_wrong(run: Run, layer: int) -> str | None:
    """Return what is wrong with what the cache says of itself."""
    if run.first.index is None or not kv.is_cut(run.cache):
        return "nothing was cut"
    seen = kv.tokens_seen(run.cache)
    if seen != LENGTH:
        return f"the cache says that it saw {seen} tokens, and {LENGTH} went through"
    survivors = run.first.index.shape[1] + STEPS
    for number in range(len(run.parts.layers)):
        if number in run.parts.kv_sources or not run.parts.has_entries(number):
            continue
        held = kv.held_entries(run.cache, number, LENGTH)
        expected = LENGTH if number < layer else survivors
        window = run.parts.window(number)
        if held != expected and not (window and number < layer and held <= expected):
            return f"layer {number} holds {held} entries of {expected}"
    return None


def _crop_wrong(run: Run, layer: int) -> str | None:
    """Forget the last token and decode it again; then try to forget tokens that were cut."""
    if not all(run.parts.has_entries(n) for n in range(len(run.parts.layers))):
        return None
    if kv.is_static(run.cache) and not CROPS_STATIC:
        return None
    if any(run.parts.window(n) for n in range(layer)):
        return None
    run.cache.crop(-1)
    run.step(LENGTH - 1)
    again = selfcheck.distance(run.states.pop(), run.states[-1])
    if not again <= _TOLERANCE:
        return f"a token that was forgotten and decoded again differs by {again:.1e}"
    try:
        run.cache.crop(-(LENGTH - BEFORE - SIDE**2 + 1))
    except SqueezeError:
        return None
    return "a crop into the part that was cut is not refused"


# Preview and rows


class _Watching(Reducer):
    """Keeps all tokens, and what attention it was shown."""

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True

    block: Block = "next"
    _seen: list[Tensor] = PrivateAttr(default_factory=list)

    @property
    def seen(self) -> list[Tensor]:
        """What was read, call by call: float32 (1, N) each."""
        return self._seen

    def needs(self) -> tuple[Need, ...]:
        return (Attention(self.block),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        self.seen.append(tokens[Attention(self.block)])
        return Reduction(tokens.mask)


def _preview(parts: ModelParts) -> str | None:
    """Preview the attention of a layer, then read it where it is computed; the cache must not notice."""
    layer = layer_to_cut(parts)
    module = parts.layers[layer]
    if parts.row.stacked or find_attention(module) is None or find_pre_norm(module) is None:
        return None
    before, inside = _Watching(block="next"), _Watching(block=-1)
    cuts = [PlannedCut(0, "canary", layer, before)]
    if layer + 1 < len(parts.layers):
        cuts.append(PlannedCut(1, "canary", layer + 1, inside))
    plan = Plan(tuple(cuts), repack=False)
    with running(parts, plan) as attachment:
        run = Run(parts, attachment, plan, trial_prompt(parts), static=False)
        run.prefill()
    for number in range(len(parts.layers)):
        held = kv.held_entries(run.cache, number, PREFILL)
        if number not in parts.kv_sources and parts.has_entries(number) and held > PREFILL:
            return f"layer {number} holds {held} entries of {PREFILL} tokens: the preview wrote into the cache"
    if len(before.seen) != 1 or len(inside.seen) != len(cuts) - 1:
        return "the attention was not read"
    if inside.seen and not selfcheck.distance(before.seen[0], inside.seen[0]) <= _TOLERANCE:
        error = selfcheck.distance(before.seen[0], inside.seen[0])
        return f"it differs from the attention of the layer by {error:.1e}"
    return None


def _rows(parts: ModelParts) -> str | None:
    """Swap the rows of cut caches, as beams do, and decode on."""
    if not all(parts.has_entries(n) for n in range(len(parts.layers))):
        return None
    swap = torch.tensor([1, 0])
    for static in sorted({case.static for case in cases_of(parts)}):
        here, there = (_behind_swap(parts, order, static) for order in (None, swap))
        error = selfcheck.distance(there, here[swap])
        if not error <= _TOLERANCE:
            return f"swapped rows of {'a static' if static else 'a growing'} cache differ by {error:.1e}"
    return None


def _behind_swap(parts: ModelParts, order: Tensor | None, static: bool) -> Tensor:
    """Return the states (2, 1, D) of one decode step behind a prefill, its rows swapped by `order` in between."""
    prompt, plan = trial_prompt(parts, 2), Plan((selfcheck.probe_cut(layer_to_cut(parts)),), repack=False)
    with running(parts, plan) as attachment:
        run = Run(parts, attachment, plan, prompt, static)
        run.prefill()
        if order is not None:
            run.cache.reorder_cache(order)
            run.prompt = TrialPrompt(2, prompt.swapped())
        run.step(PREFILL)
        return run.states[-1]


def in_words(broken: Sequence[str]) -> str:
    """Return the first few of what is broken."""
    rest = f" (and {len(broken) - 3} more)" if len(broken) > 3 else ""
    return "; ".join(broken[:3]) + rest
