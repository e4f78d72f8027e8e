"""How much of a transport plan leaves a token, from what a layer gets to what its attention makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.segment.crop import crops_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place, States

if TYPE_CHECKING:
    from torch import Tensor

_SOURCE = States("in")


class Transport(Score):
    """Score a token by the mass of the transport plan that leaves it, from the input of the block before the cut.

    arXiv 2503.18278. It goes to the states behind the block's attention, as its MLP gets them; costs are the distance
    of states, the distance on the grid and that from the middle, each scaled to 0 and 1. Few rounds of Sinkhorn, the
    last half of them on the columns, leave rows that differ. Each crop and frame is a plan of its own, with a mass of
    one per token; separators get -inf. Memory O(n * n) for the tokens of a crop or frame.

    target: "mlp_in" the states behind the attention and its norm, "out" the output of the block.
    states, apart, middle: the weights of the three costs.
    sigma: over how many cells the distance on the grid rises.
    entropy: the weight of the plan's entropy; costs are divided by it.
    rounds: of Sinkhorn.
    marginals: how much leaves and reaches a token in the end: "norm" the length of its states, "even" as much as
        others.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    main: ClassVar[str | None] = "target"

    target: Literal["mlp_in", "out"] = "mlp_in"
    states: float = Field(default=1.0, ge=0)
    apart: float = Field(default=1.0, ge=0)
    middle: float = Field(default=0.01, ge=0)
    sigma: float = Field(default=10.0, gt=0)
    entropy: float = Field(default=0.1, gt=0)
    rounds: int = Field(default=3, ge=1)
    marginals: Literal["norm", "even"] = "norm"

    def needs(self) -> tuple[Need, ...]:
        """Return the states that are brought, and those that they are brought to."""
        return _SOURCE, self._goal

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the mass that leaves each token."""
        import torch

        piece, count, slots = self._pieces(tokens)
        index, filled = ops.group_rows(piece, count, slots)
        source, goal, place = (
            ops.take(one, index).reshape(-1, slots, one.shape[-1])
            for one in (tokens[_SOURCE], tokens[self._goal], tokens.grid[..., 2:])
        )
        mask = filled.reshape(-1, slots)
        cost = ops.transport_cost(source, goal, place, mask, (self.states, self.apart, self.middle), self.sigma)
        leaves, reaches = self._marginal(source, mask), self._marginal(goal, mask)
        mass = ops.transported_mass(-cost / self.entropy, leaves, reaches, mask, self.rounds)
        mass = mass * mask.sum(1, keepdim=True)
        none = torch.full(piece.shape, -torch.inf, device=piece.device)
        return ops.put_back(none, index, filled, mass.reshape(index.shape))

    def _marginal(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return float32 (R, M) of sum 1, how much leaves or reaches each token; all alike where states are zero."""
        length = states.detach().float().norm(dim=-1) if self.marginals == "norm" else mask.float()
        # A token of length 0 would have nothing to bring, and no logarithm.
        length = length.masked_fill(~mask, 0).clamp(min=1e-6)
        return length / length.masked_fill(~mask, 0).sum(1, keepdim=True).clamp(min=1e-6)

    def _pieces(self, tokens: VisualTokens) -> tuple[Tensor, int, int]:
        """Return int64 (S, N), the crop and frame of each token, how many there are, and the most tokens of one."""
        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "Distances on the grid are a part of the transport, and the grid of this picture is not known. Write "
                "score: change, or score: norm."
            )
        crop, crops = crops_of(tokens)
        frames = max((tile.frames for tiles in tokens.tiles for tile in tiles), default=1)
        slots = max(min(tile.height * tile.width for tile in tiles) for tiles in tokens.tiles)
        frame, row = tokens.grid[..., 1], tokens.grid[..., 2]
        label = (crop * frames + frame).masked_fill((row < 0) | ~tokens.mask, -1)
        return label, crops * frames, min(slots, label.shape[1])

    @property
    def _goal(self) -> Need:
        return Features() if self.target == "out" else States("mlp_in")
