"""The front door: apply a method to a model, look at what it did, take it off again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mllm_squeeze.checking.release import require_release
from mllm_squeeze.checking.trial import try_cut
from mllm_squeeze.engine.hooks.compiled import forget_compiled, refuse_wrapped
from mllm_squeeze.engine.hooks.running import require_idle
from mllm_squeeze.errors import AlreadyAppliedError, NotAppliedError, SqueezeError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_parts
from mllm_squeeze.family.table import TABLE, UNCUTTABLE
from mllm_squeeze.handle import Handle
from mllm_squeeze.planning.fit import why_not
from mllm_squeeze.planning.shared_space import require_used
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.registry import family_plugins, method_names
from mllm_squeeze.upstream.modules import of_pipeline, unwrap

# By the inner model, so that a PEFT wrapper and the model inside it share one handle. The hooks on the model keep the
# handle alive; a strong reference here would keep the model alive as well.
_handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def apply(
    model: nn.Module, method: str | Path | Mapping[str, Any], /, *, text_encoder: Any = None, **params: Any
) -> Handle:
    """Apply a method to a HuggingFace multimodal model, in place and without a copy of its weights.

    A model that was compiled and has run is compiled anew at its next call, as is other compiled code in the process.

    model: the model, in any nesting of PEFT, torch.compile, DataParallel, DistributedDataParallel and FSDP, or a
    pipeline that holds it. method: the name of a method, the path of a YAML recipe, or a dict. text_encoder: for
    methods that compare words and pictures in a space that both share, what was trained together with the model's
    vision tower: a CLIP or SigLIP model, its folder or hub id, or a `TextEncoder` that says more. params: what the
    recipe lets one set, such as `ratio` (fraction of the visual tokens removed), `keep` (tokens kept per span, or the
    fraction kept), `total` (tokens kept of all spans of one prompt together) and `layer`. Each of the first three may
    be a list, one number for each row of the batch.

    Raises:
        AlreadyAppliedError: a method is applied to the model.
        ConfigError, UnknownNameError: the recipe or a parameter is not valid.
        UnsupportedModelError: the model, or a part that the method needs, is not there; or the text encoder cannot be
            loaded, or belongs to another vision tower.
        InUseError: another thread is inside a call of the model.
    """
    _check_order(model, method)
    model = of_pipeline(model)
    recipe = load_recipe(method, **params)
    if text_encoder is not None:
        require_used(recipe)
    parts = _find(model)
    refuse_wrapped(parts)
    present = _handle_of(parts.model)
    if present is not None:
        raise AlreadyAppliedError(
            f"'{present.method}' is applied to this model. Call squeeze.remove(model) first, or write one recipe "
            "with both steps."
        )
    require_idle(parts.called)
    require_release(parts)
    inner = weakref.ref(parts.model)
    handle = Handle(model, recipe, parts, text_encoder, gone=lambda: _forget(inner))
    forget_compiled(parts)
    _handles[parts.model] = weakref.ref(handle)
    return handle


@contextlib.contextmanager
def applied(
    model: nn.Module, method: str | Path | Mapping[str, Any], /, *, text_encoder: Any = None, **params: Any
) -> Iterator[Handle]:
    """Apply a method inside a block and remove it at its end, also after an exception; raises like `apply`."""
    handle = apply(model, method, text_encoder=text_encoder, **params)
    try:
        yield handle
    finally:
        if not handle._removed:
            handle.remove()


def remove(model: nn.Module) -> None:
    """Take the method off a model.

    Raises:
        NotAppliedError: none is applied. InUseError: another thread is inside a call of the model.
    """
    model = of_pipeline(model)
    # What was applied can be taken off, whatever was done to the model or its config since.
    found = _handle_of(unwrap(model)) or _handle_of(_find(model).model)
    if found is None:
        raise NotAppliedError(
            f"No method is applied to this {type(model).__name__}. Apply one with squeeze.apply first."
        )
    found.remove()


def _check_order(model: Any, method: Any) -> None:
    if isinstance(method, nn.Module) and isinstance(model, (str, Path, Mapping)):
        name = repr(str(model)) if isinstance(model, (str, Path)) else "recipe"
        raise UnsupportedModelError(
            f"The model comes first, then the method; got a {type(model).__name__} and a {type(method).__name__}. "
            f"Write squeeze.apply(model, {name})."
        )


def _find(model: nn.Module) -> ModelParts:
    return find_parts(model, {**TABLE, **family_plugins()})


def _forget(inner: weakref.ref[nn.Module]) -> None:
    model = inner()
    if model is not None:
        _handles.pop(model, None)


def _handle_of(inner: nn.Module) -> Handle | None:
    found = _handles.get(inner)
    return None if found is None else found()


def families() -> list[str]:
    """Return the HuggingFace model types that can be squeezed."""
    return sorted({**TABLE, **family_plugins()}.keys() - set(UNCUTTABLE))


def check(model: nn.Module, *, run: bool = False) -> dict[str, Any]:
    """Return what was found in a model, and for each method "fits" or the reason why it does not.

    run: also run a self-check, known family or not: is a cut the same as masking? Under "self_check" it says `result`
    ("passed", "failed", "not comparable", "not run"), `error`, `reason` and what it ran `on`: a model without weights
    (meta device) is tried by a small random text model of its class.

    Raises:
        UnsupportedModelError: the model cannot be squeezed at all. AlreadyAppliedError: run, with a method applied.
        InUseError: run, while another thread is inside a call of the model.
    """
    parts = _find(of_pipeline(model))
    found = _found(parts)
    if run:
        present = _handle_of(parts.model)
        if present is not None:
            raise AlreadyAppliedError(
                f"'{present.method}' is applied to this model. Call squeeze.remove(model) before a self-check."
            )
        require_idle(parts.called)
        found["self_check"] = try_cut(parts).as_dict()
    return found


def _found(parts: ModelParts) -> dict[str, Any]:
    return {
        "family": parts.row.model_type,
        "verified": parts.row.verified,
        "note": parts.row.note,
        "decoder": parts.path(parts.decoder),
        "layers": len(parts.layers),
        "tower": parts.path(parts.tower),
        "projector": parts.path(parts.projector),
        "modalities": list(parts.ids or parts.row.modalities),
        "methods": {name: _verdict(name, parts) for name in method_names()},
    }


def _verdict(name: str, parts: ModelParts) -> str:
    """Return "fits" or the reason why not, that its recipe is broken included: it must not hide the others."""
    try:
        recipe = load_recipe(name)
    except SqueezeError as error:
        return str(error)
    return why_not(recipe, parts) or "fits"
