"""The rules of methods that ship, as their recipes write them, with other numbers."""

from __future__ import annotations

from typing import Any

from mllm_squeeze.reducers.pipeline import Pipeline


def attention_rank(rows: str = "last", block: str = "before") -> Pipeline:
    """FastV and PyramidDrop."""
    return Pipeline(score={"attention": {"rows": rows, "block": block}})


def dominant_contextual(contextual: float = 0.15625, variant: str = "official") -> Pipeline:
    """VisionZip."""
    weights = {"official": "added_mean", "paper": "mean"}[variant]
    return Pipeline(
        score="encoder_attention",
        select={"in_turn": [{"select": "top_k"}, {"select": {"stride": "whole"}, "share": contextual}]},
        merge={"nearest": {"by": "encoder_keys", "into": "last", "weights": weights}},
    )


def farthest_point() -> Pipeline:
    """DivPrune."""
    return Pipeline(select="farthest_point")


def pivot_dissimilar(**options: Any) -> Pipeline:
    """DART."""
    return Pipeline(score={"norm": {"of": "keys", "order": 1}}, select={"pivots": options})


def bipartite_merge() -> Pipeline:
    """ToMe."""
    return Pipeline(merge="bipartite")


def frame_uniqueness(channels: float = 0.5, temperature: float = 0.01) -> Pipeline:
    """VidCom2."""
    span, group = ({"uniqueness": {"against": a, "channels": channels}} for a in ("span", "group"))
    return Pipeline(
        segment="frame",
        score={"fused": [{"score": span}, {"score": group}]},
        budget={"softmax": {"temperature": temperature, "score": span}},
    )


def random_subset(seed: int = 0) -> Pipeline:
    """The baseline that draws."""
    return Pipeline(score={"random": seed})


def uniform_stride(grid: bool = True) -> Pipeline:
    """The baseline that looks at nothing."""
    return Pipeline(select={"even_sample": grid})


def average_pool() -> Pipeline:
    """The pooling baseline."""
    return Pipeline(merge="pool")
