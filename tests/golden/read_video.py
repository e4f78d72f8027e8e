"""Golden cases of methods for videos that act in front of the language model."""

from __future__ import annotations

from typing import Any

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze.recipe.recipe import load_recipe


@reads("evs")
def evs(case: Case) -> dict[str, Any]:
    frames = case["features"]
    choice = squeeze.choose(
        "evs", features=frames.flatten(0, 1), grid=case["grid"].tolist(), modality="video", keep=case["kept_count"]
    )
    return {"keep": choice.kept}


@reads("llava-scissor")
def llava_scissor(case: Case) -> dict[str, Any]:
    frames = case["features"]
    grid = (len(frames), 1, frames.shape[1])
    choice = squeeze.choose(
        "llava_scissor", features=frames.flatten(0, 1), grid=grid, modality="video", above=case["tau"]
    )
    return {"merged": choice.features}


@reads("holitom")
def holitom(case: Case) -> dict[str, Any]:
    steps = load_recipe("holitom").steps
    if "hidden" in case:
        choice = squeeze.choose(
            "holitom",
            at=str(steps[1].at),
            features=case["hidden"],
            signals={"attention": case["row"]},
            modality="video",
            keep=len(case["keep"]),
        )
        return {"keep": choice.kept, "merged": choice.features}
    frames = case["features"]
    choice = squeeze.choose(
        "holitom",
        at="projector",
        features=frames.flatten(0, 1),
        signals={"encoder_attention": case["attention"].flatten()},
        grid=(len(frames), 1, frames.shape[1]),
        modality="video",
        retain=case["ratio_kept"],
        still=case["tau"],
        own=case["beta"],
    )
    order = case["representative"].argsort()
    return {"keep": choice.kept, "merged": choice.features[order.argsort()]}


@reads("fastvid")
def fastvid(case: Case) -> dict[str, Any]:
    frames = case["features"]
    recipe = load_recipe("fastvid").to_dict()
    # What describes a frame is given by itself.
    recipe["steps"][0]["frames_by"] = "encoder_states"
    choice = squeeze.choose(
        recipe,
        features=frames.flatten(0, 1),
        signals={
            "encoder_attention": case["attention"].flatten(),
            "encoder_states": case["frame_descriptor"].repeat_interleave(frames.shape[1], 0),
        },
        grid=(len(frames), 1, frames.shape[1]),
        modality="video",
        retain=case["ratio_kept"],
        runs=case["c"],
        unlike=case["tau"],
        context=case["context_share"],
        period=case["anchor_period"],
        own=case["beta"],
    )
    return {"keep": choice.kept, "merged": choice.features}


@reads("timechat-online")
def timechat_online(case: Case) -> dict[str, Any]:
    if case["method"][0] != "feature":
        raise NotImplementedError("pixels are not compared")
    choice = squeeze.choose(
        "timechat_online",
        features=case["features"].flatten(0, 1),
        grid=case["grid"].tolist(),
        modality="video",
        alike=case["threshold"],
        per_frame=not case["absolute"],
    )
    return {"keep": choice.kept}
