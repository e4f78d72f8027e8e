"""Golden cases of methods for videos that act in front of the language model."""

from __future__ import annotations

from typing import Any

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads


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
