"""Golden cases of methods for videos that merge tokens over frames, or share a budget over them."""

from __future__ import annotations

from typing import Any

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads

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
