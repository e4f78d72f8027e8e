"""The signals of one cut, each of the visual tokens it may choose from, or of the words."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals import preview
from mllm_squeeze.engine.signals.carried import carried
from mllm_squeeze.engine.signals.heard import heard
from mllm_squeeze.engine.signals.normed import normed
from mllm_squeeze.engine.signals.runs import runs
from mllm_squeeze.engine.signals.source import Found, Reading
from mllm_squeeze.engine.signals.sources import source_of
from mllm_squeeze.reducers.base import Among, Signals
from mllm_squeeze.reducers.needs import Features, Need, Normed, Runs, Size, SoundAttention
from mllm_squeeze.upstream.calls import LayerCall


def mean_weights(mask: Tensor) -> Tensor:
    """Return float32 weights (B, R) that average over the True rows."""
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def gather(
    prefill: Prefill,
    planned: PlannedCut,
    needs: tuple[Need, ...],
    hidden: Tensor,
    call: LayerCall | None,
    found: Found,
) -> tuple[Signals, Tensor | None]:
    """Return the signals of the wanted tokens, and bool (S, T), the words of each span's sample if a need reads them.

    hidden: (B, M, D) in front of the cut's layer. call: of that layer.
    """
    preview.read_ahead(prefill, planned, needs, hidden, call)
    now: dict[Need, Reading] = {}
    signals = {need: _signal(prefill, planned, need, hidden, found, now) for need in dict.fromkeys(needs)}
    if not any(need.reads_text for need in needs):
        return Signals(signals), None
    there = prefill.text_mask if prefill.text is None else prefill.text[1]
    return Signals(signals), there[found.table.sample]


def among(prefill: Prefill, planned: PlannedCut, needs: tuple[Need, ...], found: Found) -> dict[Need, Among]:
    """Return where the wanted tokens stand among all, for each need that speaks of all; behind `gather`."""
    places = {}
    for need in needs:
        source = source_of(planned, need) if getattr(need, "of", "") == "all" else None
        if source is not None:
            places[need] = prefill.signals.read[source].among(prefill, found)
    return places


def _signal(
    prefill: Prefill, planned: PlannedCut, need: Need, hidden: Tensor, found: Found, now: dict[Need, Reading]
) -> Tensor:
    if planned.carries(need):
        return carried(prefill, need, found.origin, found.rows)
    if isinstance(need, Size):
        return found.size
    if isinstance(need, SoundAttention):
        return heard(prefill, need, found.origin, found.rows)
    if isinstance(need, Runs):
        return runs(prefill, found.origin, found.rows)
    side = getattr(need, "of", "visual")
    if need == Features("text") and prefill.text is not None:
        return prefill.text[0][found.table.sample]
    source = source_of(planned, need)
    if source is not None:
        return source.shaped(need).answer(prefill, prefill.signals.read[source], found, side).to(hidden.device)
    assert isinstance(need, (Features, Normed))
    whole = replace(need, of="visual")
    if whole not in now:
        states = hidden if isinstance(need, Features) else normed(prefill, hidden)
        now[whole] = Reading(states, prefill.index)
    return now[whole].at(prefill, found, found.of(side, prefill)).to(hidden.device)
