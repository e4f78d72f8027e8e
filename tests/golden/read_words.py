"""Golden cases of methods that choose inside the language model by what the words are like."""

from __future__ import annotations

import math
from typing import Any

import torch

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import (
    Embedding,
    EncoderAttention,
    EncoderStates,
    Features,
    Normed,
    Projection,
)


@reads("mob")
def mob(case: Case) -> dict[str, Any]:
    x, start = case["features"], case["start"]
    stop = start + case["count"]
    visual, text = x[start:stop], x[stop:]
    if "K" not in case:
        choice = squeeze.choose(
            "mob",
            features=visual,
            signals={Features(of="text"): text},
            variant="qwen",
            keep=max(1, round(len(visual) * (1 - case["reduction_ratio"]))),
            share=case["prompt_ratio"],
            mix=case["alpha"],
        )
        return {"keep": choice.kept}
    recipe = load_recipe("mob", variant="official").to_dict()
    recipe["variants"]["official"]["select"]["weighted_cover"]["words"] = case["prompt_samples"]
    choice = squeeze.choose(
        recipe,
        signals={Normed(): visual, Normed("text"): text, Projection("key", of="text"): case["keys"][stop:]},
        variant="official",
        keep=case["K"],
        share=case["Kp_ratios"],
        nearest=case["k_ratio"],
    )
    return {"keep": choice.kept}


@reads("hawk")
def hawk(case: Case) -> dict[str, Any]:
    query, key = case["query"].transpose(0, 1), case["key"].transpose(0, 1)
    need = load_recipe("hawk").steps[0].built.needs()
    count = min(len(key), max(case["min_visual"], math.ceil(len(key) * case["ratio"])))
    choice = squeeze.choose(
        "hawk",
        signals=dict(zip(need, (query, key), strict=True)),
        keep=count,
        weights=case["head_weights"].tolist(),
        normalise=case["normalization"][0],
    )
    return {"keep": choice.kept}


@reads("visiontrim")
def visiontrim(case: Case) -> dict[str, Any]:
    seen, x = case["attention"], case["features"]
    given = {
        EncoderAttention(heads="mean"): seen[0, 1:],
        EncoderAttention(rows="others", heads="mean"): (seen[1:, 1:] * (1 - torch.eye(len(x)))).sum(0),
        EncoderStates(): x,
        Embedding("visual", "clip", raw=True): x @ case["visual_projection"].T,
        Embedding("text", "clip", raw=True): case["text"],
    }
    side, seeds = math.isqrt(len(x)), case["n_complement"]
    count = case["n_dominant"] + seeds
    made = {}
    for variant in ("official", "paper"):
        needs = load_recipe("visiontrim", variant=variant).steps[0].built.needs()
        choice = squeeze.choose(
            "visiontrim",
            features=x,
            signals={need: given[need] for need in needs},
            grid=(side, side),
            keep=count,
            complement=seeds / count,
            variant=variant,
        )
        assert isinstance(choice.features, torch.Tensor)
        made[variant] = choice
    official = made["official"]
    complement = torch.isin(official.kept, case["complement"])
    return {
        "keep": official.kept[~complement],
        "complement": official.kept[complement],
        "complement_tokens": official.features[complement],
        # Beside what the paper's rule keeps stands a complement of its own.
        "adaptive_keep": made["paper"].kept[torch.isin(made["paper"].kept, case["adaptive_keep"])],
    }
