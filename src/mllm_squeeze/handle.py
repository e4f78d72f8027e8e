"""What `apply` returns: a method on a model, its requests and reports, its switch to another method, its end."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mllm_squeeze.engine.hooks.attachment import Attachment
from mllm_squeeze.engine.hooks.compiled import forget_compiled
from mllm_squeeze.engine.hooks.running import require_idle
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.text_encoder import PromptEncoder, bind
from mllm_squeeze.errors import NotAppliedError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.planning.budgets import plan_like
from mllm_squeeze.planning.closest import naming_others
from mllm_squeeze.planning.fit import make_plan
from mllm_squeeze.planning.shared_space import require_used
from mllm_squeeze.recipe.recipe import Recipe, load_recipe, with_budget
from mllm_squeeze.reporting.prompted import Prompted
from mllm_squeeze.request import Call, Remembered, one_budget


class Handle(Prompted):
    """A method that is applied to a model; holding it does not keep the model alive.

    method: its name. recipe: its steps and parameters. model: the model as it was given to `apply`.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        parts: ModelParts,
        text_encoder: Any = None,
        gone: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self._model = weakref.ref(model)
        self._gone = gone
        self._removed = False
        plan, self._compared = _planned(recipe, parts, text_encoder)
        with naming_others(recipe, parts):
            self._put_on(Attachment(parts, plan, self._publish))

    def _put_on(self, attachment: Attachment) -> None:
        attachment.attach()
        self._attachment = weakref.ref(attachment)
        self._requests = attachment.requests
        self._remembered = Remembered()

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.recipe.method

    @property
    def model(self) -> nn.Module | None:
        """The model, None once it is gone."""
        return self._model()

    def using(self, *, ratio: Any = None, keep: Any = None, total: Any = None, off: bool = False) -> Call:
        """Return a block in which the model runs with another budget, and which reports what ran in it.

        This holds for the thread, or the task of an event loop, that is inside the block; no hook is put on or taken
        off. Threads that are started in it are not in it, unless they run in a copy of its context
        (`contextvars.copy_context().run`). Blocks nest; the innermost that asks for something holds.

        ratio, keep, total: as for `apply`; a list has one number for each row of the batch. off: run the dense model.
        Without any of them the block only reports.

        Raises:
            ConfigError: several are given, a number is out of range, or the method cannot take such a budget.
            NotAppliedError: the method was taken off before.
        """
        asked = one_budget({"ratio": ratio, "keep": keep, "total": total}, off)
        self._require_applied()
        if asked is None:
            return Call(self._requests, self.recipe, None, as_around=not off)
        recipe, plan = self._remembered.get(*asked) or self._asked(*asked)
        return Call(self._requests, recipe, plan, as_around=False)

    def _asked(self, name: str, value: Any) -> tuple[Recipe, Plan]:
        recipe = with_budget(self.recipe, name, value)
        attachment = self._attachment()
        if attachment is None:
            raise NotAppliedError(f"The model that '{self.method}' was applied to is gone.")
        found = recipe, plan_like(attachment.plan, recipe, attachment.parts, self._compared)
        self._remembered.put(name, value, found)
        return found

    def switch(self, method: str | Path | Mapping[str, Any], /, *, text_encoder: Any = None, **params: Any) -> None:
        """Change the method; where that fails, the one before goes on.

        A cache that was cut before goes on as it was cut. The parameters are those of `apply`.

        Raises:
            InUseError: a call of the model runs, in another thread or in this one.
            NotAppliedError: the method was taken off before. Others: as `apply` does.
        """
        self._require_applied()
        recipe = load_recipe(method, **params)
        if text_encoder is not None:
            require_used(recipe)
        before = self._attachment()
        if before is None:
            raise NotAppliedError(f"The model that '{self.method}' was applied to is gone.")
        parts = before.parts
        plan, compared = _planned(recipe, parts, text_encoder)
        after = Attachment(parts, plan, self._publish, before.requests)
        require_idle(parts.called, own_too=True)
        before.detach()
        try:
            with naming_others(recipe, parts):
                self._put_on(after)
        except BaseException:
            before.attach()
            raise
        self.recipe, self._compared, self._requests.plan = recipe, compared, plan
        forget_compiled(parts)

    def remove(self) -> None:
        """Take the method off; the model is as it was.

        Raises:
            NotAppliedError: it was taken off before. InUseError: another thread is inside a call of the model.
        """
        self._require_applied()
        attachment = self._attachment()
        if attachment is not None:
            require_idle(attachment.parts.called)
            attachment.detach()
            forget_compiled(attachment.parts)
        self._removed = True
        self._gone()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the dense model inside the block: `using(off=True)` under the name it had first.

        Raises:
            NotAppliedError: the method was taken off before.
        """
        with self.using(off=True):
            yield

    def _require_applied(self) -> None:
        if self._removed:
            raise NotAppliedError(f"'{self.method}' was already removed from this model.")

    def _publish(self, prefill: Prefill | None) -> None:
        calls = [request for request in self._requests.all_open() if isinstance(request, Call)]
        asked = next((call.recipe for call in reversed(calls) if not call.as_around), self.recipe)
        for hears in (self, *calls):
            hears.hear(asked, prefill)
        if prefill is not None:
            prefill.forget()

    def __repr__(self) -> str:
        state = "removed" if self._removed else "applied"
        return f"Handle({self.method!r}, {self.recipe.params}, {state})"


def _planned(recipe: Recipe, parts: ModelParts, text_encoder: Any) -> tuple[Plan, PromptEncoder | None]:
    """Return the plan of a recipe, and what compares words and pictures in it."""
    with naming_others(recipe, parts):
        compared = None if text_encoder is None else bind(text_encoder, parts)
        return make_plan(recipe, parts, compared), compared
