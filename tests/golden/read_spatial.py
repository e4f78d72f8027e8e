"""Golden cases of methods that choose by places on the grid, or move what was dropped along it."""

from __future__ import annotations

import math
from typing import Any

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import EncoderStates


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
