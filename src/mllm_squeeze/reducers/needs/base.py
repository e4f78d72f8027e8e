"""What all signals have in common, and the words in which they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

Place = Literal["encoder", "projector", "layer", "cache"]
Side = Literal["visual", "text"]
Whose = Literal["visual", "text", "all"]
Block = int | Literal["next"]
EncoderBlock = int | float | Literal["feature"]
Heads = Literal["mean", "sum", "max", "each"]
HeadsOfStates = Literal["concat", "mean", "each"]

EVERYWHERE: frozenset[Place] = frozenset({"encoder", "projector", "layer", "cache"})
BEHIND_TOWER: frozenset[Place] = frozenset({"projector", "layer"})
INSIDE: frozenset[Place] = frozenset({"encoder", "layer"})


@dataclass(frozen=True)
class Need:
    """Base of all signals.

    places: where a rule that reads it may act.
    phrase: what it is, in messages.
    """

    places: ClassVar[frozenset[Place]] = EVERYWHERE
    phrase: ClassVar[str]

    @property
    def name(self) -> str:
        """Its name, which several needs may share: "encoder_attention", or "projection.text" of the words."""
        word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        of = getattr(self, "of", "visual")
        return word if of == "visual" else f"{word}.{of}"

    @property
    def reads_text(self) -> bool:
        """True where the signal depends on the words of the prompt."""
        return getattr(self, "of", "visual") != "visual"

    @property
    def reads_encoder(self) -> bool:
        """True where the signal comes from inside the vision encoder and is carried to the tokens that the LLM gets."""
        return False

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"
