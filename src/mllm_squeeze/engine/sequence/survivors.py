"""Which tokens of a pass are left, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllm_squeeze.engine.kv.entries import KeptEntries
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream.attention import implementation


@dataclass(frozen=True)
class Left:
    """What cuts left of the tokens of a pass.

    index: int64 (B, M), the columns that are left. valid: bool (B, M), False for padding, None where all are real.
    shift: int64 (B, M), how many tokens are gone in front of each. visual: bool (B, M); where steps cut while decoding,
    without separators. tail: tokens behind the last visual one.
    """

    index: Tensor
    valid: Tensor | None
    shift: Tensor
    visual: Tensor
    tail: int


class Survivors:
    """The tokens that the layers to come see, of one decoder pass.

    width: tokens of this pass before any cut. past: tokens seen before. left: None while all of them are.
    """

    left: Left | None = None

    def __init__(self, plan: Plan, parts: ModelParts, width: int, past: int) -> None:
        self.plan, self.parts = plan, parts
        self.width, self.past = width, past

    @property
    def index(self) -> Tensor | None:
        """int64 (B, M), the columns that are left, None while all are."""
        return None if self.left is None else self.left.index

    @property
    def valid(self) -> Tensor | None:
        """Bool (B, M), False for padding among what cuts left, None where all is real."""
        return None if self.left is None else self.left.valid

    @property
    def repack(self) -> bool:
        """True where survivors of a new cut are renumbered."""
        parts = self.parts
        # Layers that borrow keys would see them at positions of two numberings.
        return self.plan.repack and not parts.mrope and not parts.kv_sources and parts.rotary is not None

    def renumbers(self, entries: KeptEntries | None) -> bool:
        """Say whether positions are renumbered; a cache goes on as it began, whatever is applied now."""
        return self.repack if entries is None else entries.repack

    @property
    def implementation(self) -> str:
        """Attention implementation of the text model."""
        return implementation(self.parts.text_config)
