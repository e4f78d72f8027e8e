"""What hooks on a model belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from mllm_squeeze.engine.hooks.current import Local
from mllm_squeeze.engine.hooks.installer import Installer
from mllm_squeeze.engine.hooks.requests import Requests
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.family.structure import ModelParts

Publish = Callable[[Prefill | None], None]


class HookOwner:
    """Cannot be copied: whoever copies or pickles a squeezed model comes across it, and is told why not."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.plan.refuse_copy()


class Hooks(HookOwner):
    """The hooks of one plan on one kind of modules.

    local: what runs in this thread now. requests: what it was asked for, whose plan has the budgets that hold now; the
    hooks are those of `plan`. publish: gets each prefill when it ends, None for a prompt without visual tokens.
    """

    def __init__(self, parts: ModelParts, plan: Plan, local: Local, requests: Requests, publish: Publish) -> None:
        super().__init__(plan)
        self.parts = parts
        self._local, self._requests, self._publish = local, requests, publish
        self._enabled = requests.is_on

    def attach(self, installer: Installer) -> None:
        """Put the hooks on.

        Raises:
            UnsupportedModelError: a part that the plan needs was not found, or was patched by other code.
        """
        raise NotImplementedError
