"""What was made of some objects is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# As many kinds of layers see different things. accelerate hands each layer copies of its own, which must not pile up.
_MOST = 8


class Memo:
    """Keeps what was made of objects, told apart by what they are, not by what they equal.

    It holds the objects as well: the id of one that is gone may be used again.
    """

    def __init__(self) -> None:
        self._made: dict[str, dict[tuple[Any, ...], tuple[Any, ...]]] = {}

    def once(self, name: str, *of: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` gives for these objects; numbers (not negative) and words are told apart by value."""
        made = self._made.setdefault(name, {})
        key = tuple([part if part is None or isinstance(part, (int, str)) else -id(part) for part in of])
        found = made.get(key)
        if found is None:
            if len(made) == _MOST:
                del made[next(iter(made))]
            found = made[key] = (make(), of)
        return found[0]

    def clear(self) -> None:
        """Let go of everything."""
        self._made.clear()
