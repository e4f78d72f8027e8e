"""One pass through the decoder whose layers need something of us."""

from __future__ import annotations

from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence.layer_arguments import LayerArguments
from mllm_squeeze.engine.sequence.signal_store import SignalStore
from mllm_squeeze.engine.sequence.survivors import Survivors
from mllm_squeeze.family.structure import ModelParts


class Pass(Survivors):
    """A pass over a cut cache that cuts nothing itself: a decode step, or a later turn without a picture.

    It lives as long as the pass; what later ones need lives with the cache.
    """

    def __init__(self, plan: Plan, parts: ModelParts, width: int, past: int) -> None:
        super().__init__(plan, parts, width, past)
        # Sequence length of each layer in this pass, and the entries it held before.
        self.lengths: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.signals = SignalStore()
        self.arguments = LayerArguments(self)
