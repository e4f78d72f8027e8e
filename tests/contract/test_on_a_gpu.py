"""What a GPU could do otherwise than a CPU: choose other tokens, compute in another dtype, compile a decode step.

CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import matrix
import oracle
import tiny
from contract.test_each_method import home

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or CUDA_VISIBLE_DEVICES hides it"),
]
READY = [name for name in matrix.ALL if not matrix.method(name).wants_text_encoder]
# Sums in another order, over a few layers.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let convolutions of float32 be float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def squeezed(name: str, device: str) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Return what each cut keeps, and the logits of the prefill and of a few steps."""
    family, kind = home(name)
    model = tiny.fresh(family).model.to(device)
    inputs = {key: value.to(device) for key, value in tiny.load(family).inputs[kind].items()}
    with matrix.applied(model, name) as handle:
        steps = oracle.run(model, inputs, oracle.forced_tokens(1, 3).to(device))
        kept = [row.tolist() for cut in handle.cuts for row in cut.kept]
    return kept, steps.prefill.cpu(), steps.decode.cpu()


@pytest.mark.parametrize("name", READY)
def test_a_method_answers_as_on_a_cpu(name: str) -> None:
    kept, prefill, decode = squeezed(name, "cuda")
    expected_kept, expected_prefill, expected_decode = squeezed(name, "cpu")
    assert kept == expected_kept
    torch.testing.assert_close(prefill, expected_prefill, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(decode, expected_decode, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", matrix.WAYS)
def test_a_way_generates_in_half_precision(name: str, dtype: torch.dtype) -> None:
    family, kind = home(name)
    model = tiny.fresh(family).model.to("cuda", dtype)
    given = tiny.load(family).inputs[kind].items()
    inputs: dict[str, Any] = {k: v.to("cuda", dtype if v.is_floating_point() else None) for k, v in given}
    with matrix.applied(model, name) as handle, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert handle.cuts
    assert out.shape[1] >= 4


def test_a_compiled_step_decodes_as_a_plain_one() -> None:
    model = tiny.fresh("llava").model.to("cuda")
    inputs = {key: value.to("cuda") for key, value in tiny.load("llava").inputs["image"].items()}
    with matrix.applied(model, "fastv"), torch.no_grad():
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        compiled = model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, compiled)
