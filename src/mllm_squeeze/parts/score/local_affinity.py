"""How like what lies around it a token is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class LocalAffinity(Score):
    """Score a token by how like its eight neighbours on the grid it is: a softmax over the span; separators get -inf.

    arXiv 2601.22674. Affinity to a neighbour is minus the squared distance of vectors and, with a weight, of places,
    each divided by its variance over the span. A neighbour that is not there counts as one that is the same, so that
    tokens at the border score higher.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    place: the weight of the distance on the grid.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    main: ClassVar[str | None] = "by"

    by: Vectors = "encoder_states"
    place: float = Field(default=0.5, ge=0)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return the softmax of the mean affinity, float64: what hardly varies is told apart."""
        import torch

        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "The neighbours of a token are found on the grid of its picture, which is not known here. Write score: "
                "encoder_attention."
            )
        frame = ops.frame_ids(tokens.grid, [[tile.frames for tile in tiles] for tiles in tokens.tiles])
        frame = frame.masked_fill((tokens.grid[..., 2] < 0) | ~tokens.mask, -1)
        every = [tile for tiles in tokens.tiles for tile in tiles]
        frames = max(sum(tile.frames for tile in tiles) for tiles in tokens.tiles)
        shape = frames, max(tile.height for tile in every), max(tile.width for tile in every)
        affinity = ops.local_affinity(tokens[need_of(self.by)], tokens.grid, frame, shape, self.place)
        return ops.normalised(affinity.masked_fill(frame < 0, -torch.inf), tokens.mask, "softmax")
