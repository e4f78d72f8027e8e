"""Golden cases of methods that cut inside the language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze import ops
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Attention, Need, Projection, Rotary, States


def attention_of(method: str | Mapping[str, Any], rows: Tensor, at: str | None = None) -> dict[Need | str, Tensor]:
    """Return the attention that a step reads, from all rows (H, T, N) of the words onto the visual tokens."""
    steps = [step for step in load_recipe(method).steps if at in (None, str(step.at))]
    needs = [need for need in steps[0].built.needs() if isinstance(need, Attention)]
    return {need: joined(need, rows) for need in needs}


def joined(need: Attention, rows: Tensor) -> Tensor:
    """Return rows (H, T, N) joined over heads, then over rows, as a need asks."""
    chosen = rows[:, -1:] if need.rows == "last" else rows
    how = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    by_head = chosen if need.heads == "each" else how[need.heads](chosen, 0)
    if need.rows == "last" or need.over_rows != "each":
        over = "mean" if need.rows == "last" else need.over_rows
        return how[over](by_head, -2)
    return by_head


@reads("v2drop")
def v2drop(case: Case) -> dict[str, Any]:
    layers = sorted(int(name[1:].split("_")[0]) for name in case if name.endswith("_keep"))
    return {
        f"l{layer}_keep": squeeze.choose(
            "v2drop",
            features=case[f"l{layer}_current"],
            signals={States("in"): case[f"l{layer}_previous"]},
            stage=stage,
            before=case["n_visual"],
        ).kept
        for stage, layer in enumerate(layers)
    }


@reads("priortr")
def priortr(case: Case) -> dict[str, Any]:
    (family,), (asking,), (heads,) = case["variant"], case["query_aggregation"], case["head_aggregation"]
    rows = asking if asking == "last" or family != "llava" else "text"
    recipe = load_recipe("priortr", rows=rows, heads=heads).to_dict()
    budget: dict[str, Any] = {}
    if case.get("keep_tokens", 0) > 0:
        budget = {"keep": case["keep_tokens"]}
    elif "keep_ratio" in case:
        budget = {"ratio": 1 - case["keep_ratio"]}
    else:
        (step,) = recipe["steps"]
        del recipe["params"]["ratio"], step["ratio"]
        above = next((float(case[name]) for name in case if "threshold" in name), 0.0)
        recipe["steps"] = [{**step, "select": {"threshold": above}}]
    choice = squeeze.choose(recipe, signals=attention_of(recipe, case["text_rows"]), **budget)
    return {"keep": choice.kept}


@reads("tokencarve")
def tokencarve(case: Case) -> dict[str, Any]:
    weight = case["weight"]
    choice = squeeze.choose(
        "tokencarve",
        features=case["features"],
        signals={"attention": case["attention_last_row"].mean(0)},
        keep=case["kept_count"],
        attention=weight,
        spectrum=1 - weight,
    )
    return {"keep": choice.kept, "merged": choice.features}


@reads("corematching")
def corematching(case: Case) -> dict[str, Any]:
    active = case["active"].float()
    start, stop = case["start"], case["start"] + case["count"]
    visual, text = load_recipe("corematching").steps[0].built.needs()
    choice = squeeze.choose("corematching", signals={visual: active[start:stop], text: active[stop:]})
    score = ops.shared_with_word(
        active[None, start:stop], active[None, stop:], torch.ones(1, len(active) - stop) > 0, -5
    )
    return {"keep": choice.kept, "overlap": score[0]}


@reads("transprune")
def transprune(case: Case) -> dict[str, Any]:
    found = {}
    places = [str(step.at) for step in load_recipe("transprune").steps]
    # Where the visual tokens that are left stood in each stage's sequence.
    left = [torch.arange(case["visual"])]
    for stage, fraction in enumerate(case["ratios"].tolist()):
        signals: dict[Need | str, Tensor] = {Attention("next", rows="text"): case[f"s{stage}_text_attention"]}
        among: dict[Need, Tensor] = {}
        back = 0
        for earlier in range(stage, -1, -1):
            for layer in reversed([n for n in range(99) if f"s{earlier}_l{n}_attn_in" in case]):
                back += 1
                for half, name in (("attention", "attn"), ("mlp", "ffn")):
                    for side in ("in", "out"):
                        need = States(f"{half}_{side}", of="all", block=-back)  # type: ignore[arg-type]
                        signals[need] = case[f"s{earlier}_l{layer}_{name}_{side}"]
                        among[need] = case["v0"] + left[earlier]
        names = [("first_blocks", "first"), ("second_blocks", "second"), ("blocks", "ratio")][stage]
        params = dict(zip(names, (back, 1 - fraction), strict=True))
        kept = squeeze.choose(
            "transprune", at=places[stage], signals=signals, among=among, before=case["visual"], **params
        ).kept
        found[f"s{stage}_keep"] = kept
        left = [place[case[f"s{stage}_keep"]] for place in left] + [torch.arange(len(case[f"s{stage}_keep"]))]
    return found


@reads("pact")
def pact(case: Case) -> dict[str, Any]:
    start, count = case["start"], case["count"]
    visual = slice(start, start + count)
    heads, groups = case["heads"], case["kv_heads"]
    signals: dict[Need | str, Tensor] = {
        Projection("query", of="all", block="next", rope=False, heads="each"): case["query"].unflatten(1, (heads, -1)),
        Projection("key", of="all", block="next", rope=False, heads="each"): case["key"].unflatten(1, (groups, -1)),
        Projection("key", block="next"): case["key_rotated"][visual],
    }
    choice = squeeze.choose(
        "pact",
        features=case["hidden"][visual],
        signals=signals,
        among=start,
        looked_at=case["keep_fraction"],
        cutoff=case["cutoff"],
        reach=1.5 * case["cutoff"],
    )
    return {"keep": choice.kept, "assign": choice.assign, "merged": choice.features}


@reads("btp")
def btp(case: Case) -> dict[str, Any]:
    """The file holds the picks of the grid as the code has them, for 24 x 24 cells; Qwen2.5-VL asks for none."""
    number = len(case["s1_features"])
    llava = number == 576
    kept = {}
    for stage in (1, 2, 3):
        rows = case[f"s{stage}_attention"].mean(0)
        name = ("first", "second", "ratio")[stage - 1]
        count = number // 2**stage if not llava else (288, 144, 48)[stage - 1]
        choice = squeeze.choose(
            "btp",
            at=("layer 0.09375", "layer 0.1875", "layer 0.4375")[stage - 1],
            features=case.get(f"s{stage}_features", torch.zeros(len(rows), 1)),
            signals={"attention": rows},
            grid=(24, 24) if llava and stage == 1 else None,
            before=number,
            variant="llava" if llava else "qwen",
            **{name: 1 - count / number},
        )
        kept[f"s{stage}_keep"] = choice.kept
    return kept


@reads("ivc-prune")
def ivc_prune(case: Case) -> dict[str, Any]:
    """Tables of three axes are averaged over them, as the code does."""
    values, start, count = case["values"], case["start"], case["n_visual"]
    visual = slice(start, start + count)
    tables = [case[name] if case[name].ndim == 2 else case[name].mean(0) for name in ("cos", "sin")]
    signals: dict[Need | str, Tensor] = {
        Projection("value", heads="each"): values[visual],
        Projection("value", of="text", heads="each"): values[start + count + 2 :],
        Rotary(): torch.cat(tables, 1)[visual],
    }
    if case["variant"][0] == "qwen":
        return {"keep": squeeze.choose("ivc_prune", signals=signals, keep=round(count / 2)).kept}
    signals[Projection("value", of="all", heads="each")] = values
    recipe = load_recipe("ivc_prune").to_dict()
    recipe["params"]["ratio"] = None
    choice = squeeze.choose(recipe, signals=signals, among=start, variant="llava", axis=0.05)
    return {"keep": choice.kept}


@reads("ficoco-l")
def ficoco_l(case: Case) -> dict[str, Any]:
    logits, visual = case["logits"], case["visual"]
    # Unit vectors as keys, so that the products are what is given.
    query = (logits * len(logits) ** 0.5)[:, None]
    key = torch.eye(len(logits))[:, None]
    choice = squeeze.choose(
        "ficoco_l",
        features=case["tokens"][:visual],
        signals={
            Projection("query", heads="each"): query[:visual],
            Projection("key", heads="each"): key[:visual],
            Projection("query", of="text", heads="each"): query[visual:],
            Projection("key", of="text", heads="each"): key[visual:],
        },
        keep=visual - case["removed"],
        stage=25,
        variant="official",
    )
    return {"keep": choice.kept, "out": choice.features}
