"""Golden cases of methods that choose behind the projector by what the vision encoder saw."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Embedding, EncoderProjection


@reads("fastervlm")
def fastervlm(case: Case) -> dict[str, Any]:
    row = case["cls_attention"].mean(0)
    return {"keep": squeeze.choose("fastervlm", signals={"encoder_attention": row}, keep=case["kept_count"]).kept}


@reads("vispruner")
def vispruner(case: Case) -> dict[str, Any]:
    choice = squeeze.choose(
        "vispruner",
        signals={"encoder_attention": case["cls_attention"].mean(0), "encoder_states": case["features"]},
        keep=case["kept_count"],
        important=case["important_ratio"],
    )
    return {"keep": choice.kept, "important": choice.kept[torch.isin(choice.kept, case["important"])]}


@reads("prumerge")
def prumerge(case: Case) -> dict[str, Any]:
    count = {} if case["adaptive"] else {"keep": int(len(case["features"]) * case["ratio"]) + 1}
    return merged_neighbours("prumerge", case, count)


@reads("prumerge+")
def prumerge_plus(case: Case) -> dict[str, Any]:
    recipe = load_recipe("prumerge_plus").to_dict()
    if not case["adaptive"]:
        # The code lets one set the number of the best ones; the sample comes on top.
        recipe["steps"][0]["budget"] = {"fixed": int(len(case["features"]) * case["ratio"]) + 1}
        del recipe["params"]["factor"]
    return merged_neighbours(recipe, case, {})


def merged_neighbours(method: str | dict[str, Any], case: Case, count: dict[str, Any]) -> dict[str, Any]:
    """Return the survivors, their states in the order of the case, and the one token more."""
    number = len(case["features"])
    signals = {
        EncoderProjection("query", -1, "concat", cls=True): case["query_cls"].expand(number, -1),
        EncoderProjection("key", -1, "concat"): case["keys"],
        EncoderProjection("key", -1, "concat", cls=True): case["key_cls"].expand(number, -1),
    }
    choice = squeeze.choose(method, features=case["features"], signals=signals, **count)
    assert isinstance(choice.kept, Tensor)
    assert isinstance(choice.features, Tensor)
    # The one token more stands at the best of those that were not kept.
    rest = torch.ones(number, dtype=torch.bool)
    rest[case["keep"]] = False
    extra = case["cls_attention"].masked_fill(~rest, -1).argmax()
    place = (choice.kept[None] == case["order"][:, None]).long().argmax(1)
    return {
        "keep": choice.kept[choice.kept != extra],
        "merged": choice.features[place],
        "extra": choice.features[choice.kept == extra][0],
    }


@reads("scope")
def scope(case: Case) -> dict[str, Any]:
    signals = {"encoder_attention": case["cls_attention"].sum(0), "encoder_states": case["features"]}
    return {"keep": squeeze.choose("scope", signals=signals, keep=case["n"]).kept}


@reads("cdpruner")
def cdpruner(case: Case) -> dict[str, Any]:
    crops, count = case["features"].shape[:2]
    side = math.isqrt(count)
    choice = squeeze.choose(
        "cdpruner",
        features=case["features"].flatten(0, 1),
        signals={
            Embedding("visual", "clip"): case["image_embeds"].flatten(0, 1),
            Embedding("text", "clip"): case["text_embeds"],
        },
        grid=[Tile(1, side, side)] * crops if side * side == count else [Tile(1, 1, count)] * crops,
        text=case["text_embeds"],
        keep=case["n"] * crops,
    )
    return {"keep": choice.kept.view(crops, -1) - torch.arange(crops)[:, None] * count}


@reads("otprune")
def otprune(case: Case) -> dict[str, Any]:
    count = round(case["ratio"] * len(case["features"]))
    return {"keep": squeeze.choose("otprune", features=case["features"], keep=count).kept}


@reads("trim")
def trim(case: Case) -> dict[str, Any]:
    adaptive = case["ratio"] < 0
    count = {} if adaptive else {"keep": int(len(case["features"]) * case["ratio"]) + 1}
    choice = squeeze.choose(
        "trim",
        features=case["features"],
        signals={
            Embedding("visual", "clip"): case["projected"],
            Embedding("text", "clip"): case["text_feature"][None],
        },
        text=case["text_feature"][None],
        **count,
    )
    # The one token more stands at the best of those that were not kept.
    alike = -(case["projected"] @ case["text_feature"])
    rest = torch.ones(len(alike), dtype=torch.bool)
    rest[case["keep"]] = False
    extra = alike.masked_fill(~rest, -torch.inf).argmax()
    # The code rounds what it gives to half precision.
    aggregate = choice.features[choice.kept == extra][0].half().float()
    return {"keep": choice.kept[choice.kept != extra], "aggregate": aggregate}


@reads("hiprune")
def hiprune(case: Case) -> dict[str, Any]:
    deep, anchors = case["deep_received"], case["object_received"]
    count = case["kept_count"] if "kept_count" in case else round(case["ratio_kept"] * len(deep))
    deep_need, anchor_need = load_recipe("hiprune").steps[0].built.needs()
    signals = {deep_need: deep, anchor_need: anchors}
    grid = case["grid"].tolist()
    return {"keep": squeeze.choose("hiprune", signals=signals, grid=grid, keep=count, alpha=case["alpha"]).kept}


@reads("hired")
def hired(case: Case) -> dict[str, Any]:
    late_need, first_need = load_recipe("hired").steps[0].built.needs()
    late = case["late_layer_cls"]
    if case["kind"] == "single":
        row = late.sum(0)
        signals = {late_need: row, first_need: row}
        return {"keep": squeeze.choose("hired", signals=signals, keep=int(len(row) * case["rate"])).kept}
    late = late.sum(1)
    crops, count = late.shape
    side, (rows, columns) = math.isqrt(count), case["grid_rows_cols"].tolist()
    # The library has the crops as one rectangle in raster order.
    place = torch.arange(count, crops * count).view(rows, columns, side, side).transpose(1, 2).flatten()
    order = torch.cat([torch.arange(count), place])
    first = torch.zeros(crops * count)
    first[:count] = case["first_layer_cls"].sum(0)
    choice = squeeze.choose(
        "hired",
        signals={late_need: late.flatten()[order], first_need: first},
        grid=[Tile(1, side, side), Tile(1, rows * side, columns * side)],
        keep=int(crops * count * case["rate"]),
        alpha=case["alpha"],
    )
    kept = torch.zeros(crops * count, dtype=torch.bool)
    kept[order[choice.kept]] = True
    mask = kept.view(crops, count)
    budgets = mask[1:].sum(1).int()
    return {"keep_mask": mask, "keep_flat": kept.nonzero().flatten(), "tile_budgets": budgets}


@reads("vscan")
def vscan(case: Case) -> dict[str, Any]:
    clip = case["kind"] != "qwen"
    early, deep = ("shallow_cls", "deep_cls") if clip else ("shallow_received", "deep_received")
    count = case["kept_count"] if clip else int(case["ratio_kept"] * len(case["features"]))
    recipe = load_recipe("vscan", variant="official" if clip else "qwen").to_dict()
    windows = recipe["variants"]["official" if clip else "qwen"]["windows"]
    windows["size"] = int(case.get("window", windows["size"]))
    deep_need, early_need, *_ = load_recipe("vscan").steps[0].built.needs()
    choice = squeeze.choose(
        recipe,
        features=case["features"],
        signals={deep_need: case[deep], early_need: case[early]},
        grid=case["grid"].tolist(),
        at="projector",
        variant="official" if clip else "qwen",
        first=1 - count / len(case["features"]),
    )
    return {"keep": choice.kept, "merged": choice.features}


@reads("recoverable-compression")
def recoverable_compression(case: Case) -> dict[str, Any]:
    recipe = load_recipe("recoverable_compression").to_dict()
    # The attention of the CLS token is given, and not what it is made of.
    recipe["steps"][0]["score"] = "encoder_attention"
    alike = case["text_similarity"] * math.sqrt(2)
    choice = squeeze.choose(
        recipe,
        features=case["features"],
        signals={
            "encoder_attention": case["cls_attention"],
            EncoderProjection("key", -1, "concat"): case["keys"],
            Embedding("visual", "clip"): torch.stack([alike, (1 - alike.square()).clamp(min=0).sqrt()], 1),
            Embedding("text", "clip"): torch.tensor([[1.0, 0.0]]),
        },
        text=torch.zeros(1, 1),
    )
    assert isinstance(choice.kept, Tensor)
    assert isinstance(choice.features, Tensor)
    rest = torch.ones(len(alike), dtype=torch.bool)
    rest[case["keep"]] = False
    rest[case["centres"]] = False
    extra = case["cls_attention"].masked_fill(~rest, -1).argmax()[None] if len(case["centres"]) else case["centres"]
    order = torch.cat([case["keep"], case["centres_order"], extra])
    place = torch.searchsorted(choice.kept, order)
    return {
        "keep": choice.kept[~torch.isin(choice.kept, torch.cat([case["centres"], extra]))],
        "merged": choice.features[place.clamp(max=len(choice.kept) - 1)],
    }


@reads("zoo-prune")
def zoo_prune(case: Case) -> dict[str, Any]:
    def project(x: Tensor) -> Tensor:
        inner = torch.nn.functional.gelu(x @ case["w1"].T + case["b1"])
        return inner @ case["w2"].T + case["b2"]

    moved = ops.push_response(case["features"], project, case["directions"], case["step"])
    count = int(case["ratio"] * len(moved))
    choice = squeeze.choose("zoo_prune", features=project(case["features"]), signals={"sensitivity": moved}, keep=count)
    return {"projected": project(case["features"]), "sensitivity": moved, "keep": choice.kept}
