"""Golden cases of methods for videos that merge tokens over frames, or share a budget over them."""

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
from mllm_squeeze.reducers.needs import Attention, Embedding

# How the authors' settings name what is picked of each frame.
FLASHVID_PICKS = {"attn": "score", "div": "unlike", "attn_div": "seen", "attn_div_v2": "run"}


@reads("flashvid")
def flashvid(case: Case) -> dict[str, Any]:
    frames = case["features"]
    choice = squeeze.choose(
        "flashvid",
        at="projector",
        features=frames.flatten(0, 1),
        signals={"encoder_attention": case["attention"].flatten()},
        grid=(len(frames), 1, frames.shape[1]),
        modality="video",
        variant="official",
        retain=case["retention_ratio"],
        expand=case["expansion"],
        runs=case["min_segment_num"],
        unlike=case["segment_threshold"],
        best=case["alpha"],
        pick=FLASHVID_PICKS[case["selection"][0]],
        hang=case["temporal_threshold"],
    )
    return {"keep": choice.kept, "merged": choice.features}


def in_pieces(rows: Tensor, sizes: list[int]) -> Tensor:
    """Return rows in an order that follows from what they hold, piece by piece."""
    key = rows.double() @ torch.arange(1, rows.shape[1] + 1).double().cos()
    return torch.cat([piece[value.argsort()] for piece, value in zip(rows.split(sizes), key.split(sizes), strict=True)])


@reads("prunevid")
def prunevid(case: Case) -> dict[str, Any]:
    labels = case["labels"]
    whole = [ops.whole_runs(row) for row in labels.reshape(-1, labels.shape[-1]).tolist()]
    found: dict[str, Any] = {"labels_refined": torch.tensor(whole).view(labels.shape)}
    if "features" not in case:
        return found
    frames = case["features"]
    choice = squeeze.choose(
        "prunevid",
        at="projector",
        features=frames.flatten(0, 1),
        grid=(len(frames), *case["grid"].tolist()[1:]),
        modality="video",
        steady=case["tau"],
        pieces=case["gamma"],
        clusters=case["cluster_ratio"],
    )
    assert choice.assign is not None and isinstance(choice.kept, Tensor) and isinstance(choice.features, Tensor)
    places, piece = frames.shape[1], torch.arange(len(case["window_sizes"])).repeat_interleave(case["window_sizes"])
    # What is steady holds tokens of several frames.
    late = torch.arange(len(choice.assign)) // places > choice.assign // places
    still = late.new_zeros(len(late)).index_fill(0, choice.assign[late], True)[choice.kept]
    of = piece[choice.kept // places]
    found["static_sizes"] = torch.bincount(of[still], minlength=len(case["window_sizes"]))
    found["dynamic_sizes"] = torch.bincount(of[~still], minlength=len(case["window_sizes"]))
    found["merged"] = in_pieces(choice.features, torch.bincount(of).tolist())
    if "text_attention" in case:
        found["keep"] = _prunevid_in_the_model(case)
    return found


def _prunevid_in_the_model(case: Case) -> Tensor:
    """Return what the second cut keeps, where what is steady in a piece is a frame of its own."""
    names = ("window_sizes", "static_sizes", "dynamic_sizes")
    groups = [
        tile
        for frames, static, moving in zip(*(case[name].tolist() for name in names), strict=True)
        for tile in (Tile(1, 1, static), Tile(frames, 1, moving // frames))
        if tile.cells
    ]
    choice = squeeze.choose(
        "prunevid",
        at=str(load_recipe("prunevid").steps[1].at),
        signals={"attention": case["text_attention"].amax((0, 1))},
        grid=groups,
        modality="video",
        retain=case["alpha"],
    )
    assert isinstance(choice.kept, Tensor)
    return choice.kept


@reads("dytok")
def dytok(case: Case) -> dict[str, Any]:
    frames = case["features"]
    number, places = frames.shape[:2]
    weights = case["frame_weights"].mean(0).repeat_interleave(places)[None, None]
    choice = squeeze.choose(
        "dytok",
        features=frames.flatten(0, 1),
        signals={
            Attention(-1, rows="last", heads="each"): weights[0],
            "encoder_attention": case["attention"].flatten(),
            "encoder_projection": case["metric"].flatten(0, 1),
        },
        grid=(number, 1, places),
        modality="video",
        keep=(case["dominant"] + case["contextual"]) * number,
        blocks=1,
        most=case["upper_limit"],
    )
    assert isinstance(choice.kept, Tensor) and isinstance(choice.features, Tensor)
    budget = torch.bincount(choice.kept // places, minlength=number)
    best = 6 * budget // 7
    # Of what is kept in a frame the best are those that are looked at most.
    received = case["attention"].flatten()[choice.kept]
    dominant = ops.rank_within(received[None], (choice.kept // places)[None], received[None] == received[None])[0]
    dominant = dominant < best[choice.kept // places]
    order = (2 * (choice.kept // places) + (~dominant).long()).argsort(stable=True)
    return {
        "frame_budget": budget,
        "dominant_num": best,
        "contextual_num": budget - best,
        "keep_dominant": choice.kept[dominant],
        "merged": choice.features[order],
    }


@reads("longvu")
def longvu(case: Case) -> dict[str, Any]:
    kind = case["kind"][0]
    if kind == "dedup":
        frames, places = case["dino"].shape[:2]
        # As much room as the frames that stay need whole.
        room = len(case["keep_frames"]) * places
        settings = {"window": case["window"], "alike": case["threshold"]}
        kept = _longvu(
            case["dino"], case["dino"], torch.ones(1, case["dino"].shape[2]), (frames, 1, places), room, **settings
        )
        return {"keep_frames": (kept // places).unique()}
    if kind == "stc":
        frames, places = case["features"].shape[:2]
        settings = {"small": 1.0, "run": case["window"], "still": case["threshold"]}
        words = torch.ones(1, case["features"].shape[2])
        grid = (frames, 1, places)
        return {"keep": _longvu(case["features"], None, words, grid, case["max_visual"], **settings)}
    low, places = case["low"], case["high"].shape[1]
    side, few = math.isqrt(places), math.isqrt(low.shape[1])
    row = torch.arange(side) * few // side
    # Whole frames whose averages are the small ones of the file, which are no averages there.
    frames = low[:, (row[:, None] * few + row).flatten()]
    settings = {"small": few * few / places}
    kept = _longvu(frames, None, case["text_features"], (len(low), side, side), case["max_visual"], **settings)
    number = torch.bincount(kept // places, minlength=len(low))
    return {"high_frames": (number == places).nonzero().flatten(), "total": len(kept)}


def _longvu(
    frames: Tensor, seen: Tensor | None, words: Tensor, grid: tuple[int, int, int], keep: int, **settings: Any
) -> Tensor:
    """Return what is kept; seen: what describes frames, by default each as unlike all others."""
    if seen is None:
        seen = torch.eye(len(frames))[:, None].expand(-1, frames.shape[1], -1)
    choice = squeeze.choose(
        "longvu",
        features=frames.flatten(0, 1),
        signals={"encoder_states": seen.flatten(0, 1)},
        text=words,
        grid=grid,
        modality="video",
        keep=keep,
        **settings,
    )
    assert isinstance(choice.kept, Tensor)
    return choice.kept


@reads("sttm")
def sttm(case: Case) -> dict[str, Any]:
    frames, grid = case["features"], case["grid"].tolist()
    choice = squeeze.choose(
        "sttm",
        features=frames.flatten(0, 1),
        grid=grid,
        modality="video",
        alike=case["tau_s"],
        over_time=case["tau_t"] if case["tau_t"] > 0 else None,
        skip=case["root_level"],
        mean="cells" if case["weighted"] else "squares",
        links="early",
    )
    assert choice.assign is not None and isinstance(choice.kept, Tensor)
    return {
        "keep": choice.kept,
        "merged": choice.features,
        "patches": torch.bincount(choice.assign, minlength=len(choice.assign))[choice.kept],
    }


@reads("kvtp")
def kvtp(case: Case) -> dict[str, Any]:
    frames = case["features"]
    number, places = frames.shape[:2]
    # Cosines of a tenth of the logits.
    alike = (case["logits"].amax(0) / 10).repeat_interleave(places)
    choice = squeeze.choose(
        "kvtp",
        features=frames.flatten(0, 1),
        signals={
            "encoder_attention": case["attention"].flatten(),
            "encoder_states": case["keys"].flatten(0, 1),
            Embedding("visual", "clip", pooled=True): torch.stack([alike, (1 - alike.square()).sqrt()], 1),
            Embedding("text", "clip"): torch.tensor([[1.0, 0.0]]),
        },
        grid=(number, 1, places),
        modality="video",
        keep=round(number * places * case["ratio_kept"]),
        temperature=case["temperature"] / 10,
        variant="official",
    )
    assert isinstance(choice.kept, Tensor) and isinstance(choice.features, Tensor)
    row = torch.zeros(number * places, dtype=torch.int64)
    row[choice.kept] = torch.arange(len(choice.kept))
    return {
        "counts": torch.bincount(choice.kept // places, minlength=number),
        "keep": choice.kept,
        # In the order of the code: the best of a frame first.
        "merged": choice.features[row[case["order"].long()]],
    }


@reads("aim")
def aim(case: Case) -> dict[str, Any]:
    if "logits" in case:
        return _aim_walk(case)
    frames = case["features"]
    return {name: _aim_merged(frames, share) for name, share in (("merged_once", 0.5), ("merged_twice", 0.25))}


def _aim_merged(frames: Tensor, left: float) -> Tensor:
    """Return the frames (F, T * left, D) of the first step; a round leaves tokens in raster order, as the code does."""
    count, places, width = frames.shape
    step = {
        "at": "projector",
        "ratio": 1 - left,
        "segment": "frame",
        "merge": "bipartite_rounds",
    }
    choice = squeeze.choose(
        {"method": "merged", "steps": [step]},
        features=frames.flatten(0, 1),
        grid=(count, 1, places),
        modality="video",
    )
    assert isinstance(choice.features, Tensor)
    return choice.features.view(count, -1, width)


def _aim_walk(case: Case) -> dict[str, Any]:
    """Return the importance after each layer; tokens that left before stay as rows of the walk, and are no keys."""
    _, heads, size, _ = case["logits"].shape
    key = torch.eye(size)[None, :, None].expand(-1, -1, heads, -1)
    visual = torch.zeros(size, dtype=torch.bool)
    visual[case["visual_start"] : case["visual_stop"]] = True
    there = torch.ones(1, size, dtype=torch.bool)
    alive, importance, kept = there, [], []
    for number, layer in enumerate(case["layers"].tolist()):
        query = case["logits"][number].float().permute(1, 0, 2)[None] * size**0.5
        rank = ops.page_rank(query, key, there, alive, 0.1, 5)
        words = int((~visual).sum())
        left = int((size - words) * (1 - (layer - 13) / 8) + words) - words
        alive = ops.top_k_mask(rank, alive & visual, torch.tensor([left])) | ~visual
        importance.append(rank[0])
        kept.append(alive[0])
    return {"importance": torch.stack(importance), "kept_after": torch.stack(kept)}
