"""Makes torch.compile look at a model again when hooks came or went: its code is not guarded against that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.modules import inside_compiled
from mllm_squeeze.upstream.versions import library_folder


def refuse_wrapped(parts: ModelParts) -> None:
    """Check that what torch.compile returned was not put in the place of the text model or the inner model.

    Raises:
        UnsupportedModelError: it was; hooks on it do not see what the module inside is called with.
    """
    for name, module in (("inner model", parts.base), ("text model", parts.decoder)):
        if inside_compiled(module) is not None:
            raise UnsupportedModelError(
                f"The {name} was replaced by what torch.compile returned ({type(module).__name__}). Put the module "
                "back and compile it in place with its compile() method, or compile the whole model."
            )


def forget_compiled(parts: ModelParts) -> None:
    """Let torch.compile forget its code where some of it may be of this model; what is called next is compiled anew.

    torch forgets all or nothing, so other compiled models pay for it as well. Where only other things were compiled
    than models, nothing happens.
    """
    places = _places(parts)
    if any(code.co_filename.startswith(places) for code in _compiled_code()):
        torch.compiler.reset()


def _places(parts: ModelParts) -> tuple[str, ...]:
    """Return where the code is that runs when a model is called."""
    called: tuple[nn.Module, ...] = (parts.model, parts.base, parts.decoder, parts.layers[0])
    files = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in called}
    return (library_folder(), str(Path(str(nn.__file__)).parent), *(file for file in files if file))


def _compiled_code() -> Iterator[CodeType]:
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    for found in () if frames is None else tuple(frames.input_codes.seen):
        code = found()
        if code is not None:
            yield code
