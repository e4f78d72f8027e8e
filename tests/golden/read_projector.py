"""Golden cases of methods that choose behind the projector by what the vision encoder saw."""

from __future__ import annotations

from typing import Any

import torch

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads


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
