"""Golden cases of methods that choose behind the projector by what the vision encoder saw."""

from __future__ import annotations

from typing import Any

import mllm_squeeze as squeeze
from golden.case import Case
from golden.readings import reads


@reads("fastervlm")
def fastervlm(case: Case) -> dict[str, Any]:
    row = case["cls_attention"].mean(0)
    return {"keep": squeeze.choose("fastervlm", signals={"encoder_attention": row}, keep=case["kept_count"]).kept}
