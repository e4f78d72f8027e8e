"""What a bug report needs: the versions of everything that takes part, and the device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from mllm_squeeze import __version__, registry

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "flash-attn", "triton", "peft", "av")


def environment() -> dict[str, Any]:
    """Return versions, device and plugins as plain data; None where a package is not installed. Imports torch."""
    out: dict[str, Any] = {
        "mllm-squeeze": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    out |= {name: _version(name) for name in PACKAGES}
    return {**out, **_device(), "plugins": _plugins()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"device": None}
    threads = f"threads: {torch.get_num_threads()}, cores: {os.cpu_count()}"
    out: dict[str, Any] = {"device": f"cpu, {threads}", "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        out["device"] = f"{', '.join(names)}; cpu, {threads}"
    elif torch.backends.mps.is_available():
        out["device"] = f"mps; cpu, {threads}"
    return out


def _plugins() -> list[str]:
    groups = (registry.REDUCERS_GROUP, registry.METHODS_GROUP, registry.FAMILIES_GROUP)
    return sorted(
        f"{group.rpartition('.')[2]}: {p.name} = {p.value}" for group in groups for p in entry_points(group=group)
    )
