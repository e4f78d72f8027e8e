"""The errors that users see: each is a SqueezeError and also the built-in exception it is closest to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SqueezeError(Exception):
    """Base of all errors of this library; its message says what was given, what is allowed and what to do.

    avoid: what another method must not read so that it may work where this one does not: some of "attention" (of any
    module), "attention of the LLM", "encoder attention" and "text". Empty where any other method may work, None where
    another method is no way out. To an error that says so `apply` adds the names of methods that do fit.
    """

    def __init__(self, *args: object, avoid: Iterable[str] | None = None) -> None:
        super().__init__(*args)
        self.avoid = None if avoid is None else frozenset(avoid)


class ConfigError(SqueezeError, ValueError):
    """A recipe, a parameter or a budget is not valid."""


class UnknownNameError(SqueezeError, KeyError):
    """A method, reducer or family name is not registered."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message, with quotes and escapes.
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(SqueezeError, TypeError):
    """The model, or a part that the method needs, is not there."""


class UnsupportedInputError(SqueezeError, ValueError):
    """This call to the model cannot be squeezed exactly."""


class AlreadyAppliedError(SqueezeError, RuntimeError):
    """A method is already applied to the model."""


class NotAppliedError(SqueezeError, RuntimeError):
    """There is nothing to remove from the model."""


class InUseError(SqueezeError, RuntimeError):
    """The model runs in another thread, so nothing can be put on it or taken off now."""


class SqueezeWarning(UserWarning):
    """Something that the user asked for had no effect, or less than asked."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return the sentence that lists the allowed names and points at the closest one."""
    names = sorted(allowed)
    return f"Allowed: {', '.join(names) or 'none'}.{closest(given, names)}"


def closest(given: str, allowed: Iterable[str]) -> str:
    """Return the question whether the closest of the allowed names was meant, with a space in front; "" without one."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
