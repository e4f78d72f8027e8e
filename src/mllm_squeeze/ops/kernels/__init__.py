"""Triton twins of the hot ops: the same arguments, the same answer, one launch or two instead of many.

The torch op next door is the reference and the CPU path; it calls its twin where `available` holds. The environment
variable MLLM_SQUEEZE_KERNELS decides:

- unset: tensors on a CUDA device of compute capability 8.0 or newer, where triton can be imported;
- `1`: the same, but a missing triton is an error;
- `0`: never;
- `interpret`: CPU tensors too, through Triton's interpreter (for tests; very slow). Triton reads TRITON_INTERPRET when
  it is imported, so set this before anything imports triton.

Scores agree with the torch op to about 1e-5 relative (float32 sums, bf16 and fp16 products are exact); choices agree
wherever the scores they rest on differ by more than that. float64 always takes the torch op.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SWITCH = "MLLM_SQUEEZE_KERNELS"


def available(tensor: Tensor) -> bool:
    """Return whether the kernels may work on this tensor: its device and dtype, and the switch.

    Raises ValueError for an unknown value of the switch, RuntimeError where it asks for what cannot be had.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1", "interpret"):
        raise ValueError(f"{SWITCH} must be 0, 1 or interpret; got {wanted!r}")
    if wanted == "0" or not _right_dtype(tensor):
        return False
    if wanted == "interpret":
        return _interpreting()
    if not tensor.is_cuda or not _modern(tensor.get_device()):
        return False
    if wanted == "1" and not _has_triton():
        raise RuntimeError(f"{SWITCH}=1 asks for Triton kernels, but triton is not installed. Install it or unset it.")
    return _has_triton()


def launching(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a launch goes to the device of the tensor; Triton takes the current one."""
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(tensor.device)


def readable(tensor: Tensor) -> Tensor:
    """Return the tensor as tl.dot can take it: the interpreter multiplies the bits of bf16, so it gets float32."""
    import torch

    return tensor.float() if tensor.dtype == torch.bfloat16 and not tensor.is_cuda else tensor


def power_of_two(n: int, least: int = 16) -> int:
    """Return the smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def precision(tensor: Tensor) -> str:
    """Return how a product of such tensors is made: float32 without TF32, because close scores decide who stays."""
    return "ieee" if tensor.element_size() == 4 else "tf32"


def _right_dtype(tensor: Tensor) -> bool:
    import torch

    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _modern(device: int) -> bool:
    import torch

    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _interpreting() -> bool:
    """Switch Triton's interpreter on; True when it is."""
    if not _has_triton():
        raise RuntimeError(f"{SWITCH}=interpret needs triton, which is not installed.")
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    # Triton's own helpers (tl.sum, ...) show which way it was imported; ours must go the same way.
    helper = importlib.import_module("triton.language.standard").zeros
    if os.environ.get("TRITON_INTERPRET") != "1" or type(helper).__name__ != "InterpretedFunction":
        raise RuntimeError(
            f"{SWITCH}=interpret came too late: triton is imported already. Set TRITON_INTERPRET=1 before the program "
            "starts."
        )
    return True
