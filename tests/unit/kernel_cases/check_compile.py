"""The kernels compile for a Hopper GPU and fit into it, without one. Run by test_kernels.py in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mllm_squeeze.ops import attention_band
from mllm_squeeze.ops.kernels import attention, cover, gather, gram, greedy, match, turns

# Shared memory of one block on an H100 or H200.
SHARED = 227 * 1024


class Hopper:
    """What Triton asks of a driver to compile, but not to launch."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Collect what the launches of a test compile to."""
    found = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(kernel)
        return kernel

    triton.runtime.driver.set_active(Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module in (attention, gram, match):
        monkeypatch.setattr(module, "readable", lambda x: x)
    yield found
    assert found
    for kernel in found:
        assert kernel.metadata.shared <= SHARED
        spilled, registers = usage(kernel, tmp_path)
        print(kernel.metadata.name, "registers", registers, "spilled", spilled, "shared", kernel.metadata.shared)
        assert spilled == 0, f"{kernel.metadata.name} spills {spilled} bytes of registers"


def usage(kernel, folder: Path):
    """Return bytes of spilled registers and registers per thread, as the assembler says."""
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    ptxas = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas"))
    command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills and registers, said
    return int(spills[1]), int(registers[1])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 80)])
def test_attention(built, dtype, dim):
    # Few and many programs: small and large blocks.
    for groups in (2, 8) if dtype == torch.bfloat16 else (2,):
        query, key = torch.ones(1, 8, 2080, dim, dtype=dtype), torch.ones(1, groups, 2080, dim, dtype=dtype)
        attention.attention_from_rows(query, key, torch.ones(1, 2080), None, 0.1, None, attention_band(2080, 2080))


def test_attention_of_one_row_with_a_mask(built):
    query, key = torch.ones(2, 8, 1, 256, dtype=torch.bfloat16), torch.ones(2, 2, 2880, 256, dtype=torch.bfloat16)
    seen = torch.ones(2, 1, 1, 2880, dtype=torch.bool)
    attention.attention_from_rows(query, key, torch.ones(2, 1), seen, 0.1, 30.0)


@pytest.mark.parametrize("tokens", [2880, 16384])
def test_greedy_loops(built, tokens):
    # The matrix is not read, only its strides are.
    matrix = torch.empty(1).expand(1, tokens, tokens)
    mask, one = torch.ones(1, tokens, dtype=torch.bool), torch.ones(1, 1, 1)
    start, k = torch.ones(1, tokens), torch.ones(1, dtype=torch.int64)
    greedy._select(matrix, start, mask, k, one, one, dpp=False)
    greedy._select(matrix, start, mask, k, one, one, dpp=True)
    whole = start.to(torch.int64)
    cover.launch(matrix.int(), whole, mask, k, 1, start.double(), mask.to(torch.int8))
    turns.least_alike_in_turns(mask, torch.ones(1, 8, tokens), torch.ones(1, 8, dtype=torch.int64))


def test_matrix_and_rows_of_greedy_loops(built, monkeypatch):
    x, mask = torch.ones(1, 160, 128, dtype=torch.bfloat16), torch.ones(1, 160, dtype=torch.bool)
    gram.gram(x, mask, None, distance=True)
    gram.gram(x, mask, None, distance=False)
    greedy._by_rows(x, mask, torch.tensor([2]), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_match_merge_and_gather(built, dtype):
    x, index = torch.ones(2, 576, 64, dtype=dtype), torch.zeros(2, 288, dtype=torch.int64)
    match.best_target(x, index, index, torch.ones(2, 288, dtype=torch.bool))
    match.merge_tokens(x, torch.zeros(2, 576, dtype=torch.int64), torch.ones(2, 576))
    tables = torch.ones(3, 2, 576, 128)
    gather.gather_together(index, (x, tables, tables, torch.zeros(2, 576, dtype=torch.int64)))
