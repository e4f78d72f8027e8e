"""The steps of a recipe, resolved for one model: which reducer runs where, and how much it may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from mllm_squeeze.amount import RULE_DECIDES, Amount
from mllm_squeeze.engine.text_encoder import PromptEncoder
from mllm_squeeze.errors import UnsupportedModelError
from mllm_squeeze.reducers.base import Facts, Reducer
from mllm_squeeze.reducers.needs import Embedding, Need


# Two cuts are the same only if they are one: what a pass reads is kept by its cut, and reducers need not be hashable.
@dataclass(frozen=True, eq=False)
class PlannedCut:
    """One cut at the input of a decoder layer.

    step: number of the recipe's step. layer: first layer that runs short. amount: how much is left of the original
    tokens when all stages have run. stage, stages: place in a schedule of several cuts. text_encoder: what the user
    gave to compare words and pictures with, None without one.
    """

    step: int
    name: str
    layer: int
    reducer: Reducer
    amount: Amount = RULE_DECIDES
    stage: int = 0
    stages: int = 1
    text_encoder: PromptEncoder | None = None

    @cached_property
    def facts(self) -> Facts:
        """What is known of its rule: gathered from all parts, so once, and not again in each prefill."""
        return self.reducer.facts

    @property
    def decides(self) -> bool:
        """True where nothing says how much is left but the rule itself."""
        return self.facts.decides and not self.amount.given

    def carries(self, need: Need) -> bool:
        """True for a signal that is read inside the vision encoder and carried to the tokens that the LLM gets."""
        return need.reads_encoder or (self.text_encoder is not None and is_shared(need) and not need.reads_text)


@dataclass(frozen=True)
class Plan:
    """All cuts of a method on one model, in the order of their layers."""

    cuts: tuple[PlannedCut, ...]
    repack: bool
    # A reduction inside the encoder, and one of the cache while decoding; each at most once.
    encoder: PlannedCut | None = None
    # Encoder blocks in front of which it acts; empty for all in front of the feature layer.
    encoder_blocks: tuple[int, ...] = ()
    decode: PlannedCut | None = None
    # Reductions of keys that the text, or the queries of a Q-Former, attend to; there is nothing else then.
    keys: tuple[PlannedCut, ...] = ()
    # The plan whose hooks serve this one, which differs from it in budgets alone.
    base: Plan | None = None

    def is_of(self, plan: Plan) -> bool:
        """True where the hooks of a plan serve this one."""
        return self is plan or self.base is plan

    def refuse_copy(self) -> NoReturn:
        """Say why a squeezed model can be neither copied nor pickled.

        Raises:
            UnsupportedModelError: always; a copy would share the hooks of the original.
        """
        steps = [*self.cuts, *self.keys, *(step for step in (self.encoder, self.decode) if step is not None)]
        raise UnsupportedModelError(
            f"'{steps[0].name}' is applied to this model, and a copy or a pickle of it would carry its hooks. Call "
            "squeeze.remove(model) first, copy or save, and apply the method again. save_pretrained and state_dict "
            "work as they are."
        )

    def at(self, layer: int) -> Sequence[PlannedCut]:
        """Return the cuts at one layer."""
        return [cut for cut in self.cuts if cut.layer == layer]

    @property
    def first(self) -> int | None:
        """First layer with a cut, the duplicates of an encoder reduction included."""
        layers = [cut.layer for cut in self.cuts] + ([0] if self.encoder is not None else [])
        return min(layers, default=None)

    @property
    def modalities(self) -> frozenset[str]:
        """What its steps reduce, taken together."""
        steps = [*self.cuts, *self.keys, *(step for step in (self.encoder, self.decode) if step is not None)]
        return frozenset[str]().union(*(step.facts.modalities for step in steps))

    @property
    def needs(self) -> frozenset[Need]:
        """All signals that the cuts ask for."""
        return frozenset(need for cut in self.cuts for need in cut.reducer.needs())

    @property
    def encoder_needs(self) -> frozenset[Need]:
        """The signals that are read inside the vision encoder for cuts behind it."""
        return frozenset(need for cut in self.cuts for need in cut.reducer.needs() if cut.carries(need))

    @property
    def text_encoder(self) -> PromptEncoder | None:
        """What the user gave to compare words and pictures with, None without one."""
        return next((cut.text_encoder for cut in self.cuts), None)

    @property
    def falls_back(self) -> bool:
        """True where the language model's own space stands in for that of a text encoder."""
        return self.text_encoder is None and any(is_shared(need) for need in self.needs)


def is_shared(need: Need) -> bool:
    """True for words or pictures that are wanted in the space of a text encoder."""
    return isinstance(need, Embedding) and need.space == "clip"
