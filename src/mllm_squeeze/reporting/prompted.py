"""What was done to the last prompt, as a handle or one request tells it."""

from __future__ import annotations

from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.trace import Cut
from mllm_squeeze.errors import NotAppliedError
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.recipe.recipe import Recipe
from mllm_squeeze.reporting.record import FinishedPrefill, finished, record
from mllm_squeeze.reporting.report import Report


class Prompted:
    """Keeps the last prompt that it heard of."""

    _nothing_yet = (
        "Nothing to report: no prompt with an image or video went through the model since apply. Run the model once."
    )

    def __init__(self) -> None:
        # A method may be switched, so what a prompt was cut by is kept with it.
        self._last: tuple[Recipe, FinishedPrefill] | None = None
        self._saw_text_only = False

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Cuts of the last prompt, in the order in which they happened; empty where it had no visual tokens.

        Where `layout.keys` is true, they kept columns of the keys that are attended to, not of the prompt.
        """
        last = self._last
        return () if last is None else last[1].cuts

    @property
    def layout(self) -> TokenLayout | None:
        """Where the spans of the last prompt were, None where it had no visual tokens."""
        last = self._last
        return None if last is None else last[1].layout

    def report(self) -> Report:
        """Return what the prefill of the last prompt did: tokens, lengths, FLOPs and the rule's own time.

        Decode steps and later turns without a picture, on the same cache, belong to that prompt. A handle's is the last
        prompt of any thread, also after `remove`; that of a request is its own.

        Raises:
            NotAppliedError: there was no prompt yet, or the last one had no visual tokens.
        """
        last = self._last
        if last is not None:
            return Report(record(*last))
        if self._saw_text_only:
            raise NotAppliedError(
                "Nothing to report: the last prompt held no visual tokens, so nothing was cut. Run the model on a "
                "prompt with an image or video."
            )
        raise NotAppliedError(self._nothing_yet)

    def hear(self, recipe: Recipe, prefill: Prefill | None) -> None:
        """Keep a prefill that ended, None for a prompt without visual tokens."""
        self._last = None if prefill is None else (recipe, finished(prefill))
        self._saw_text_only = prefill is None
