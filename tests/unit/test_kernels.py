"""The Triton kernels against the torch ops, in processes of their own: Triton reads its settings on import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mllm_squeeze import ops
from mllm_squeeze.ops import kernels

CASES = Path(__file__).parent / "kernel_cases"
ROOT = Path(__file__).parents[2]
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")


def major_minor(package):
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


# Loop bounds become numbers by a conversion that newer numpy refuses.
BROKEN = TRITON and major_minor("triton") < (3, 7) and major_minor("numpy") >= (2, 4)
needs_interpreter = pytest.mark.skipif(BROKEN, reason="Triton's interpreter before 3.7 needs numpy before 2.4")
INTERPRET = {kernels.SWITCH: "interpret", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(program, **environment):
    env = {**os.environ, "TRITON_INTERPRET": "0", kernels.SWITCH: "", **environment}
    return subprocess.run([sys.executable, *program], capture_output=True, text=True, env=env, check=False)


def check(*cases, **environment):
    files = [str(CASES / f"check_{name}.py") for name in cases]
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@needs_interpreter
@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_torch_ops():
    check("attention", "choice", "rows", **INTERPRET)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_agree_with_the_torch_ops_on_a_gpu():
    check("attention", "choice", "rows", **{kernels.SWITCH: "1"})


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton has its assembler on Linux only")
def test_kernels_compile_for_a_gpu_that_is_not_there():
    check("compile", CUDA_VISIBLE_DEVICES="")


@needs_triton
@needs_interpreter
def test_the_benchmark_runs_and_its_contestants_agree(tmp_path):
    done = run([str(ROOT / "benchmarks" / "kernels.py"), "--smoke", "--json", str(tmp_path / "out.json")])
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["cases"]) == 13 and report["environment"]["triton"]
    for case in report["cases"]:
        assert case["difference"] <= (1e-2 if case["case"] == "merge tokens" else 1e-5), case
        assert {"kernel", "torch"} <= set(case["contestants"])
    assert {"full map", "sdpa forward"} <= set(report["cases"][0]["contestants"])


def test_kernels_stay_away_from_the_cpu(monkeypatch):
    x = torch.randn(1, 4, 8)
    for value in ("", "0", "1"):
        monkeypatch.setenv(kernels.SWITCH, value)
        assert not kernels.available(x)
    monkeypatch.setenv(kernels.SWITCH, "interpret")
    assert not kernels.available(x.double())
    monkeypatch.setenv(kernels.SWITCH, "yes")
    with pytest.raises(ValueError, match="0, 1 or interpret"):
        kernels.available(x)


@needs_triton
def test_a_late_switch_to_the_interpreter_is_an_error():
    code = (
        "import os, torch, triton\n"
        f"os.environ['{kernels.SWITCH}'] = 'interpret'\n"
        "from mllm_squeeze.ops import kernels\n"
        "try:\n    kernels.available(torch.ones(1))\nexcept RuntimeError as error:\n    print(error)"
    )
    done = run(["-c", code])
    assert "too late" in done.stdout, done.stderr


def test_importing_the_switch_imports_neither_torch_nor_triton():
    done = run(["-c", "import sys, mllm_squeeze.ops.kernels\nprint({'torch', 'triton'} & set(sys.modules))"])
    assert done.stdout.strip() == "set()", done.stderr


def test_gather_together_takes_rows_and_passes_gradients():
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[0, 2, 4], [1, 2, 3]])
    tables, positions = torch.randn(3, 1, 5, 4), torch.arange(10).view(2, 5)
    taken, rope, place = ops.gather_together(index, (hidden, tables, positions))
    for b in range(2):
        assert torch.equal(taken[b], hidden[b, index[b]])
        assert torch.equal(rope[:, b], tables[:, 0, index[b]])
    assert place.tolist() == [[0, 2, 4], [6, 7, 8]]
    taken.sum().backward()
    assert hidden.grad[0, :, 0].tolist() == [1, 0, 1, 0, 1]


def test_attention_band_is_causal_windowed_and_packed():
    low, high = ops.attention_band(3, 5)
    assert low.tolist() == [[0, 0, 0]] and high.tolist() == [[3, 4, 5]]
    low, high = ops.attention_band(5, 5, window=2)
    assert low.tolist() == [[0, 0, 1, 2, 3]] and high.tolist() == [[1, 2, 3, 4, 5]]
    low, high = ops.attention_band(5, 5, causal=False, cu_seqlens=torch.tensor([0, 2, 5]))
    assert low.tolist() == [[0, 0, 2, 2, 2]] and high.tolist() == [[2, 2, 5, 5, 5]]


def test_a_band_is_the_mask_it_stands_for():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8)
    low, high = ops.attention_band(7, 9, window=4)
    keys = torch.arange(9)
    dense = ((keys >= low[0, :, None]) & (keys < high[0, :, None]))[None, None]
    padding = torch.rand(2, 1, 1, 9) > 0.3
    wanted = ops.attention_received(query, key, dense & padding, 0.3)
    for block in (None, 3):
        got = ops.attention_received(query, key, padding, 0.3, block=block, band=(low, high))
        assert torch.allclose(got, wanted, atol=1e-6)
