"""Golden cases of methods that choose by places on the grid, or move what was dropped along it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze import ops
from mllm_squeeze.engine.encoder.read import read_attention
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import EncoderAttention, EncoderStates
from mllm_squeeze.upstream.attention_call import AttentionCall


@reads("nuwa")
def nuwa(case: Case) -> dict[str, Any]:
    needs = load_recipe("nuwa").steps[0].built.needs()
    grid = case["grid"].tolist()
    choice = squeeze.choose(
        "nuwa",
        at="projector",
        features=case["features"],
        signals={need: case["sim_features" if isinstance(need, EncoderStates) else "attention"] for need in needs},
        grid=grid,
        first=1 - case["n"] / len(case["features"]),
        each=case["top_n"],
        quantile=case["quantile"],
        radius=math.sqrt(case["distance_sq"]) / max(grid),
    )
    return {"keep": choice.kept, "tokens": choice.features}


@reads("mustdrop")
def mustdrop(case: Case) -> dict[str, Any]:
    recipe = load_recipe("mustdrop")
    layers = str(recipe.steps[1].at)
    if case["kind"] == "llm":
        rows, keys = case["text_attention"], case["key_set"]
        marks = torch.zeros(rows.shape[1])
        marks[keys] = 1
        signals = dict(zip(recipe.steps[1].built.needs(), (rows.sum(0), rows.amax(0), marks), strict=True))
        share = len(keys) / rows.shape[1]
        # The two thresholds, the one for all words first, whatever the file calls them.
        together, alone = (case[name] for name in case if isinstance(case[name], float))
        given = {"together": together, "alone": alone}
        choice = squeeze.choose("mustdrop", at=layers, signals=signals, protected=share, **given)
        after = torch.isin(choice.kept, keys).nonzero().flatten()
        return {"keep": choice.kept, "key_set_after": after}
    height, width = case["grid"].tolist()
    side = case["window"].tolist()[0]
    choice = squeeze.choose(
        "mustdrop",
        at="projector",
        features=case["features"],
        signals={"encoder_states": case["features"]},
        grid=(height, width),
        similarity=case["threshold"],
    )
    # A square stands at its last place in the file, and at its first one here.
    place = case["place"] - (case["size"] > 1).long() * (side - 1) * (width + 1)
    order = torch.searchsorted(choice.kept, place.long())
    size = torch.bincount(choice.assign, minlength=height * width)[choice.kept]
    row = case["cls_attention"].mean(0)
    silent = dict(zip(recipe.steps[1].built.needs(), (torch.ones_like(row), torch.ones_like(row), row), strict=True))
    marked = squeeze.choose("mustdrop", at=layers, signals=silent, together=1e9, alone=1e9).kept
    return {
        "merged": choice.features[order],
        "size": size[order].float(),
        "place": choice.kept[order] + case["place"] - place,
        "key_set": marked,
    }


@reads("prunesid")
def prunesid(case: Case) -> dict[str, Any]:
    """From the principal parts of the file on, which come from a random decomposition."""
    hidden, parts = case["hidden"], case["components"]
    if hidden.ndim == 2:
        hidden, parts = hidden[None], parts[None]
    marked = "cls_attention" in case
    x = hidden[:, hidden.shape[1] - parts.shape[1] :]
    score = case["cls_attention"].sum(1) if marked else None
    number = x.shape[1]
    count = case["need"] - 1 if marked else max(round(number * case["need"] / 576), 16)
    total = torch.full((len(x),), min(count, number))
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    keep = ops.picked_of_parts(parts, x, score, mask, total, torch.full_like(total, parts.shape[2]))
    kept = keep.nonzero()[:, 1].view(len(x), -1)
    return {"keep_patches": kept.view(case["keep_patches"].shape)}


@reads("vflowopt")
def vflowopt(case: Case) -> dict[str, Any]:
    if case["kind"] == "importance":
        # Queries and keys that give the attention of the file: its logarithm, and the identity.
        rows = case["attention"][None].clamp(min=1e-38).log()
        keys = torch.eye(rows.shape[-1]).expand_as(rows)
        call = AttentionCall(torch.nn.Identity(), rows, keys, keys, None, scaling=1.0)
        need = EncoderAttention(rows="outliers", heads="mean", factor=case["outlier_factor"])
        return {"importance": read_attention(need, call, SimpleNamespace(has_cls=False, cls_place=0))[0]}
    side = case["base_side"]
    rows, columns = case["crop_grid"].tolist()
    tiles = [Tile(1, side, side), Tile(1, rows, columns - 1, row_separators=1)]
    recipe = load_recipe("vflowopt")
    need = recipe.steps[0].built.needs()[0]
    score = case["importance"].clone()
    place = torch.tensor([cell for tile in tiles for cell in tile.coordinates()])
    score[place[:, 1] < 0] = -torch.inf
    choice = squeeze.choose(
        "vflowopt",
        at="projector",
        features=case["features"],
        signals={need: score},
        grid=tiles,
        first=round(len(score) * (1 - case["ratio_kept"])) / len(score),
        cell=case["m"],
    )
    return {"keep": choice.kept, "merged": choice.features}
