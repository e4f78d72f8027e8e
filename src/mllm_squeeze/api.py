"""The front door: apply a method to a model, look at what it did, take it off again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mllm_squeeze.config import Recipe, load_recipe
from mllm_squeeze.engine.runtime import Runtime
from mllm_squeeze.engine.session import Session
from mllm_squeeze.engine.trace import Cut
from mllm_squeeze.engine.trial import try_cut
from mllm_squeeze.errors import AlreadyAppliedError, NotAppliedError, SqueezeError, UnsupportedModelError
from mllm_squeeze.family.structure import ModelParts, find_parts
from mllm_squeeze.family.table import TABLE
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.planner import make_plan, why_not
from mllm_squeeze.recording import record
from mllm_squeeze.registry import family_plugins, method_names
from mllm_squeeze.report import Report

# By the inner model, so that a PEFT wrapper and the model inside it share one handle. The hooks on the model keep the
# handle alive; a strong reference here would keep the model alive as well.
_handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


class Handle:
    """A method that is applied to a model.

    method: its name. recipe: its steps and parameters. model: the model as it was given to `apply`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, parts: ModelParts) -> None:
        self.recipe = recipe
        self._model = weakref.ref(model)
        self._inner = weakref.ref(parts.model)
        self._last: Session | None = None
        self._runtime: Runtime | None = Runtime(parts, make_plan(recipe, parts), self._publish)
        self._runtime.attach()

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.recipe.method

    @property
    def model(self) -> nn.Module | None:
        """The model, None once it is gone."""
        return self._model()

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Cuts of the last prefill, in the order in which they happened; empty before the first one.

        Where `layout.keys` is true, they kept columns of the keys that are attended to, not of the prompt.
        """
        return () if self._last is None else tuple(self._last.cuts)

    @property
    def layout(self) -> TokenLayout | None:
        """Where the spans of the last prefill were, None before the first one."""
        return None if self._last is None else self._last.layout

    def report(self) -> Report:
        """Return what the last prefill did: tokens, lengths, FLOPs and the rule's own time.

        Raises:
            NotAppliedError: there was no prefill with visual tokens yet.
        """
        if self._last is None:
            raise NotAppliedError(
                "Nothing to report: no prompt with an image or video went through the model since apply. Run the model "
                "once."
            )
        return Report(record(self.recipe, self._last))

    def remove(self) -> None:
        """Take the method off; the model is as it was.

        Raises:
            NotAppliedError: it was taken off before.
        """
        if self._runtime is None:
            raise NotAppliedError(f"'{self.method}' was already removed from this model.")
        self._runtime.detach()
        self._runtime = None
        inner = self._inner()
        if inner is not None:
            _handles.pop(inner, None)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the dense model inside the block, to compare in one process."""
        runtime = self._runtime
        if runtime is None:
            raise NotAppliedError(f"'{self.method}' was already removed from this model.")
        before, runtime.enabled = runtime.enabled, False
        try:
            yield
        finally:
            runtime.enabled = before

    def _publish(self, session: Session) -> None:
        session.forget()
        self._last = session

    def __repr__(self) -> str:
        state = "removed" if self._runtime is None else "applied"
        return f"Handle({self.method!r}, {self.recipe.params}, {state})"


def apply(model: nn.Module, method: str | Path | Mapping[str, Any], /, **params: Any) -> Handle:
    """Apply a method to a HuggingFace multimodal model, in place and without a copy of its weights.

    method: the name of a method, the path of a YAML recipe, or a dict. params: what the recipe lets one set, such as
    `ratio` (fraction of the visual tokens removed), `keep` (tokens kept per span, or the fraction kept) and `layer`.

    Raises:
        AlreadyAppliedError: a method is applied to the model.
        ConfigError, UnknownNameError: the recipe or a parameter is not valid.
        UnsupportedModelError: the model, or a part that the method needs, is not there.
    """
    _check_order(model, method)
    recipe = load_recipe(method, **params)
    parts = _find(model)
    present = _handle_of(parts.model)
    if present is not None:
        raise AlreadyAppliedError(
            f"'{present.method}' is applied to this model. Call squeeze.remove(model) first, or write one recipe "
            "with both steps."
        )
    handle = Handle(model, recipe, parts)
    _handles[parts.model] = weakref.ref(handle)
    return handle


@contextlib.contextmanager
def applied(model: nn.Module, method: str | Path | Mapping[str, Any], /, **params: Any) -> Iterator[Handle]:
    """Apply a method inside a block and remove it at its end, also after an exception; raises like `apply`."""
    handle = apply(model, method, **params)
    try:
        yield handle
    finally:
        if handle._runtime is not None:
            handle.remove()


def remove(model: nn.Module) -> None:
    """Take the method off a model.

    Raises:
        NotAppliedError: none is applied.
    """
    found = _handle_of(_find(model).model)
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


def _handle_of(inner: nn.Module) -> Handle | None:
    found = _handles.get(inner)
    return None if found is None else found()


def families() -> list[str]:
    """Return the HuggingFace model types that can be squeezed."""
    return sorted({**TABLE, **family_plugins()})


def check(model: nn.Module, *, run: bool = False) -> dict[str, Any]:
    """Return what was found in a model, and for each method "fits" or the reason why it does not.

    run: also run a self-check, known family or not: is a cut the same as masking? Under "self_check" it says `result`
    ("passed", "failed", "not comparable", "not run"), `error`, `reason` and what it ran `on`: a model without weights
    (meta device) is tried by a small random text model of its class.

    Raises:
        UnsupportedModelError: the model cannot be squeezed at all. AlreadyAppliedError: run, with a method applied.
    """
    parts = _find(model)
    found = _found(parts)
    if run:
        present = _handle_of(parts.model)
        if present is not None:
            raise AlreadyAppliedError(
                f"'{present.method}' is applied to this model. Call squeeze.remove(model) before a self-check."
            )
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
        "modalities": list(parts.ids),
        "methods": {name: _verdict(name, parts) for name in method_names()},
    }


def _verdict(name: str, parts: ModelParts) -> str:
    """Return "fits" or the reason why not, that its recipe is broken included: it must not hide the others."""
    try:
        recipe = load_recipe(name)
    except SqueezeError as error:
        return str(error)
    return why_not(recipe, parts) or "fits"
