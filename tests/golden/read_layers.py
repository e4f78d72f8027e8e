"""Golden cases of methods that cut behind several layers, and go by what earlier cuts left."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from golden.case import Case
from golden.readings import reads
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.base import Reduction, Signals, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Features


@reads("framefusion")
def framefusion(case: Case) -> dict[str, Any]:
    step = load_recipe(
        "framefusion", depth=28, cost=case["cost"], alike=case["sim_bound"], enough=case["ratio_bound"]
    ).steps[0]
    frames, places, _ = case["features"].shape
    lead, number = case["text_before"], frames * places
    found: dict[str, Any] = {}
    history: list[int] = []
    for layer in range(case["layers"]):
        ids, hidden, row = (case[f"l{layer}_{name}"] for name in ("ids", "hidden", "row"))
        visual = (ids >= lead) & (ids < lead + number)
        origin = ids[visual].long() - lead
        count = len(origin)
        history = history or [count]
        tokens = VisualTokens(
            mask=torch.ones(1, count, dtype=torch.bool),
            budget=torch.tensor([count]),
            counts=(count,),
            grid=torch.stack([origin * 0, origin // places, origin * 0, origin % places], 1)[None],
            origin=origin[None],
            lengths=(number,),
            current=(count,),
            tiles=((Tile(frames, 1, places),),),
            signals=Signals({Features(): hidden[visual][None], Attention(): row[visual][None]}),
            asked=False,
        )
        # In front of the first cut nothing was left by another.
        tokens = tokens if layer == 0 else replace(tokens, history=(tuple(history),))
        reduction = step.built.reduce(tokens)
        out = _with_words(hidden, visual, reduction)
        found[f"l{layer}_out_ids"], found[f"l{layer}_out"] = ids[out[0]], out[1]
        history.append(int(reduction.keep.sum()))
    shares = [1 - after / before for before, after in pairwise(history)]
    return {**found, "sparsity": torch.tensor(shares[: len(case["sparsity"])])}


def _with_words(hidden: Tensor, visual: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Return which rows of a layer are left, words among them, and their states."""
    rows = hidden.clone()
    rows[visual] = reduction.states(hidden[visual][None])[0]
    left = ~visual
    left[visual] = reduction.keep[0]
    return left, rows[left]
