"""Golden cases of methods that rank by attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.base import Signals, VisualTokens
from mllm_squeeze.reducers.needs import Features


@reads("fastv")
def fastv(case: Case) -> dict[str, Any]:
    row = case["attention_last_row"].mean(0)
    return {"keep": squeeze.choose("fastv", signals={"attention": row}, ratio=case["ratio_removed"]).kept}


@reads("pyramiddrop")
def pyramiddrop(case: Case) -> dict[str, Any]:
    ratios = case["ratios"].tolist()
    method = scheduled("pyramiddrop", ratios)
    found = {}
    for stage in range(len(ratios)):
        row = pyramiddrop_row(case, stage)
        choice = squeeze.choose(method, signals={"attention": row}, stage=stage, before=case["visual"])
        found[f"s{stage}_keep"] = choice.kept
    return found


def scheduled(method: str, kept: list[float]) -> dict[str, Any]:
    """Return the recipe of a method of one step that leaves these fractions after its stages."""
    recipe = load_recipe(method).to_dict()
    (step,) = recipe["steps"]
    del step["ratio"], recipe["params"]["ratio"]
    layers = [(n + 1) / (len(kept) + 1) for n in range(len(kept))]
    return {**recipe, "steps": [{**step, "kept": kept}], "params": {**recipe["params"], "layers": layers}}


def pyramiddrop_row(case: Case, stage: int) -> Tensor:
    """Return the attention of the last prompt token to the visual tokens of a stage, mean over heads."""
    query, keys = case[f"s{stage}_query"], case[f"s{stage}_keys"]
    attention = (query[:, None] * keys).sum(-1).mul(query.shape[-1] ** -0.5).softmax(-1)
    return attention[:, case["v0"] : keys.shape[1] - case["text_after"]].mean(0)


@reads("visionzip")
def visionzip(case: Case) -> dict[str, Any]:
    dominant, contextual = case["dominant_patches"], case["contextual"]
    attention, features, targets = case["cls_attention"].sum(0), case["features"], case["targets"]
    choice = squeeze.choose(
        "visionzip",
        features=features,
        signals={"encoder_attention": attention, "encoder_projection": case["keys"]},
        keep=dominant + contextual,
        contextual=contextual / (dominant + contextual),
    )
    assert isinstance(choice.kept, Tensor)
    assert isinstance(choice.features, Tensor)
    merged = torch.isin(choice.kept, targets)
    return {
        "dominant": choice.kept[~merged],
        "targets": choice.kept[merged],
        "contextual_features": choice.features[merged],
    }


@reads("sparsevlm")
def sparsevlm(case: Case) -> dict[str, Any]:
    stage = {"keep": case["kept_count"] + case["clusters"], "layers": [0.5]}
    choice = squeeze.choose("sparsevlm", features=case["features"], signals={"attention": case["scores"]}, **stage)
    assert isinstance(choice.kept, Tensor)
    assert isinstance(choice.features, Tensor)
    centre = torch.isin(choice.kept, case["candidates"])
    (step,) = load_recipe("sparsevlm", **stage).steps
    words = {Features(): case["visual_embeddings"][None], Features("text"): case["text_embeddings"][None]}
    raters = step.built.choose_rows(
        VisualTokens(
            mask=torch.ones(1, len(case["scores"]), dtype=torch.bool),
            budget=torch.tensor([1]),
            counts=(1,),
            grid=torch.full((1, len(case["scores"]), 4), -1),
            origin=torch.arange(len(case["scores"]))[None],
            lengths=(len(case["scores"]),),
            signals=Signals(words),
            text_mask=torch.ones(1, len(case["text_embeddings"]), dtype=torch.bool),
        )
    )
    return {
        "raters": raters[0].nonzero().flatten(),
        "keep": choice.kept[~centre],
        "cluster_means": in_one_order(choice.features[centre], case["cluster_means"]),
    }


def in_one_order(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (R, D) in the order of those (R, D) that they are nearest to."""
    return rows if len(rows) != len(like) else rows[torch.cdist(like.double(), rows.double()).argmin(1)]


@reads("adaptinfer")
def adaptinfer(case: Case) -> dict[str, Any]:
    visual, words = case["text_to_visual"], case["text_to_text"]
    count = case["kept_count"] if "kept_count" in case else max(1, int(case["ratio_kept"] * visual.shape[-1]))
    to_tokens, to_words = load_recipe("adaptinfer").steps[0].built.needs()
    choice = squeeze.choose(
        "adaptinfer",
        signals={to_tokens: visual, to_words: words},
        keep=min(count, visual.shape[-1] - 1),
        layers=[0.5],
    )
    return {"keep": choice.kept}
