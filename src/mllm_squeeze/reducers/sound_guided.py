"""What is heard says how much of the video beside it stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.reducers.base import Mix, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place, Runs, SoundAttention

if TYPE_CHECKING:
    from torch import Tensor

# Others that a density looks at.
_NEIGHBOURS = 5
_HEARD = SoundAttention()


@dataclass(frozen=True)
class _Side:
    """The sound, or the video, of one prompt, in order.

    rows: its spans. row, column: int64 (P,), where its tokens stand among the spans. x: float32 (P, D). block: int64
    (P,), the run of the prompt that each stands in. sizes: tokens of each block.
    """

    rows: Sequence[int]
    row: Tensor
    column: Tensor
    x: Tensor
    block: Tensor
    sizes: list[int]


class SoundGuided(Reducer):
    """Keep what the audio encoder looks at, and more of the video where more of the sound beside it stays.

    OmniZip, arXiv 2511.14582, in front of the language model. Of the sound the tokens that receive most attention stay,
    and an even sample of the others as anchors; the rest of it that is most like some token of the video, a few tokens
    for each anchor, goes into the anchor most like it, which becomes the mean of itself and of theirs, weighted by the
    softmax of that likeness. Each run of the video in the prompt is guided by the run of sound of the same number, see
    `ops.block_shares`; runs without one lose the share `video`. Of its first, third, ... frame a run keeps the tokens
    that are dense and far from denser ones, of the others those least like the token at their place one frame before. A
    budget that the step asks for is taken as the share of the video, and half of what leaves there leaves of the sound.
    It waits for the device.

    sound: the share of the sound that is dropped, anchors aside.
    video: the share of the video that leaves.
    context: the share of the sound that is anchors.
    members: tokens that go into an anchor at most; 0 makes no anchors.
    lowest: the smallest share of a guided run that leaves; where less is asked for, all runs lose that.
    highest: the largest; where more is asked for, all runs lose that.

    Differs from the authors' code: several recordings of a prompt share one softmax; each frame keeps a token at least;
    of equal densities the lower index is denser; batches work, and prompts with sound or video alone.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video", "audio"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    why_more: ClassVar[str] = "half of what leaves of the video leaves of the sound, anchors aside"

    sound: float = Field(default=0.3, ge=0, lt=1)
    video: float = Field(default=0.6, ge=0, lt=1)
    context: float = Field(default=0.05, ge=0, le=1)
    members: int = Field(default=3, ge=0)
    lowest: float = Field(default=0.35, ge=0, lt=1)
    highest: float = Field(default=0.75, ge=0, lt=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut, what the audio encoder attends to, and the runs of the prompt."""
        return (Features(), _HEARD, Runs())

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into the anchors."""
        import torch

        keep = tokens.mask.clone()
        entries: list[tuple[Tensor, ...]] = []
        for sample in sorted(set(tokens.sample)):
            rows = [row for row, one in enumerate(tokens.sample) if one == sample]
            if tokens.asked and all(tokens.counts[row] >= tokens.current[row] for row in rows):
                continue
            heard = self._side(tokens, [row for row in rows if tokens.modality[row] == "audio"])
            seen = self._side(tokens, [row for row in rows if tokens.modality[row] == "video"])
            kept = self._sound(tokens, heard, seen, entries)
            keep[heard.row, heard.column] = kept
            self._video(tokens, seen, self._shares(tokens, heard, seen, kept), keep)
        if not entries:
            return Reduction(keep)
        return Reduction(keep, mix=Mix(*(torch.cat(part) for part in zip(*entries, strict=True))))

    def _side(self, tokens: VisualTokens, rows: Sequence[int]) -> _Side:
        import torch

        index = torch.tensor(rows, dtype=torch.long, device=tokens.mask.device)
        which, column = tokens.mask[index].nonzero(as_tuple=True)
        row = index[which]
        run = torch.stack([row, tokens[Runs()][row, column]], 1)
        _, block, sizes = torch.unique_consecutive(run, dim=0, return_inverse=True, return_counts=True)
        return _Side(rows, row, column, tokens.features[row, column].float(), block, sizes.tolist())

    def _left(self, tokens: VisualTokens, side: _Side) -> float:
        """Return the share of a side that is asked to leave."""
        return 1 - sum(tokens.counts[row] for row in side.rows) / max(len(side.row), 1)

    def _sound(self, tokens: VisualTokens, heard: _Side, seen: _Side, entries: list[tuple[Tensor, ...]]) -> Tensor:
        """Return bool (P,), the tokens of sound that stay; what goes into anchors is added to the entries."""
        import torch

        number = len(heard.row)
        share = self._left(tokens, heard) / 2 if tokens.asked else self.sound
        score = tokens[_HEARD][heard.row, heard.column][None]
        count = torch.tensor([round((1 - share) * number)], device=score.device)
        kept = ops.top_k_mask(score, torch.ones_like(score, dtype=torch.bool), count)[0]
        rest = (~kept).nonzero().flatten()
        wanted = round(self.context * number) if self.members else 0
        if not wanted or not len(rest):
            return kept
        anchors = rest[:: max(1, len(rest) // wanted)][:wanted]
        kept[anchors] = True
        pool = rest[~kept[rest]]
        if len(pool) and len(seen.row):
            entries.append(self._into_anchors(heard, seen, anchors, pool))
        return kept

    def _into_anchors(self, heard: _Side, seen: _Side, anchors: Tensor, pool: Tensor) -> tuple[Tensor, ...]:
        """Return (span, into, source, weight, row of the source) of what goes into anchors; both (P,) of the sound."""
        import torch

        into = ops.cosine(heard.x[pool][None], heard.x[anchors][None])[0].argmax(1)
        like = ops.cosine(heard.x[pool][None], seen.x[None])[0].amax(1)
        member = (
            ops.rank_within(like[None], into[None], torch.ones_like(into[None], dtype=torch.bool))[0] < self.members
        )
        pool, into, like = pool[member], into[member], like[member]
        mine = into == torch.arange(len(anchors), device=into.device)[:, None]
        weight = like.where(mine, -torch.inf).softmax(1)[into, torch.arange(len(into), device=into.device)]
        taking = anchors[mine.any(1)]
        source, target = torch.cat([taking, pool]), torch.cat([taking, anchors[into]])
        half = torch.cat([torch.ones_like(taking, dtype=torch.float32), weight]) / 2
        return heard.row[target], heard.column[target], heard.column[source], half, heard.row[source]

    def _shares(self, tokens: VisualTokens, heard: _Side, seen: _Side, kept: Tensor) -> list[float]:
        """Return the share of each run of the video that leaves."""
        import torch

        share = self._left(tokens, seen) if tokens.asked else self.video
        guided = min(len(heard.sizes), len(seen.sizes))
        stay = torch.bincount(heard.block[kept], minlength=len(heard.sizes)).tolist()
        shares = [number / size for number, size in zip(stay, heard.sizes, strict=True)][:guided]
        # Outside of the bounds no run can lose less than the others, and the whole lose what is asked for.
        inside = self.lowest <= share <= self.highest or not tokens.asked
        bounds = (self.lowest, self.highest) if inside else (share, share)
        guides = ops.block_shares(shares, seen.sizes[:guided], share, *bounds, meet=tokens.asked)
        return [*guides, *[share] * (len(seen.sizes) - guided)]

    def _video(self, tokens: VisualTokens, seen: _Side, shares: Sequence[float], keep: Tensor) -> None:
        """Write into bool (S, N) what stays of the video."""
        import torch

        if not seen.rows:
            return
        block = torch.zeros_like(tokens.origin)
        block[seen.row, seen.column] = seen.block
        for row, token in zip(seen.rows, frame_tables(_of_rows(tokens, seen.rows)), strict=True):
            x, places = tokens.features[row].float()[token], token.shape[1]
            owner = block[row, token[:, 0]].tolist()
            counts = [max(1, ops.floor_exact(places * (1 - shares[one]))) for one in owner]
            late = torch.tensor([(t - owner.index(one)) % 2 == 1 for t, one in enumerate(owner)], device=x.device)
            score = torch.where(late[:, None], _change(x), ops.lone_peaks(x, _NEIGHBOURS))
            chosen = ops.top_k_mask(
                score, torch.ones_like(score, dtype=torch.bool), torch.tensor(counts, device=x.device)
            )
            keep[row, token.flatten()] = chosen.flatten()


def _change(x: Tensor) -> Tensor:
    """Return (T, P), minus the cosine of each token of x (T, P, D) to the one of the frame before."""
    unit = ops.unit(x)
    return -(unit * unit.roll(1, 0)).sum(-1)


def _of_rows(tokens: VisualTokens, rows: Sequence[int]) -> VisualTokens:
    """Return some spans, without their signals."""
    picked = list(rows)
    return replace(
        tokens,
        mask=tokens.mask[picked],
        grid=tokens.grid[picked],
        origin=tokens.origin[picked],
        tiles=tuple(tokens.tiles[row] for row in rows),
        current=tuple(tokens.current[row] for row in rows),
        lengths=tuple(tokens.lengths[row] for row in rows),
    )
