"""Which parts go together in a pipeline, and the sentences that say which do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_squeeze.errors import did_you_mean
from mllm_squeeze.parts.base import Merge, Score, Segment, Select
from mllm_squeeze.parts.segment.whole import Whole

if TYPE_CHECKING:
    from mllm_squeeze.parts.stage import Half
    from mllm_squeeze.reducers.pipeline import Pipeline


def check_parts(pipeline: Pipeline) -> None:
    """Raise ValueError where the parts of a pipeline do not go together."""
    if pipeline.parts or pipeline.segment.parts:
        _check_halves(pipeline)
    else:
        _check_end(pipeline.score, pipeline.segment, pipeline.select, pipeline.merge, pipeline.model_fields_set)
    if pipeline.score is None and getattr(pipeline.budget, "scored", False):
        raise ValueError(f"budget '{_name(pipeline.budget)}' needs a score; give the step one")


def _check_end(
    score: Score | None, segment: Segment, select: Select, merge: Merge | None, given: set[str], where: str = ""
) -> None:
    if merge is not None and merge.picks and "select" in given:
        raise ValueError(f"{where}merge '{_name(merge)}' picks the survivors itself; leave select out")
    if select.scored and score is None:
        raise ValueError(f"{where}select '{_name(select)}' picks by a score; give it one, like score: attention")
    for part in (select, merge):
        if part is not None and not part.grouped and not isinstance(segment, Whole):
            raise ValueError(f"{where}{part.kind} '{_name(part)}' works on whole spans; leave segment out")


def _check_halves(pipeline: Pipeline) -> None:
    names, given = pipeline.segment.parts, pipeline.parts
    if not names:
        raise ValueError(
            f"segment '{_name(pipeline.segment)}' tells no parts apart, so there can be no parts "
            f"({', '.join(given)}); use a segment that does, like stillness"
        )
    for name in given:
        if name not in names:
            raise ValueError(f"parts: unknown part '{name}'. {did_you_mean(name, names)}")
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"segment '{_name(pipeline.segment)}' tells {' and '.join(names)} apart; parts lacks "
            f"{' and '.join(missing)}"
        )
    rivals = sorted({"select", "merge"} & pipeline.model_fields_set)
    if rivals:
        raise ValueError(f"{' and '.join(rivals)} stand in each of parts, not beside it")
    for name, half in given.items():
        _check_half(pipeline, half, f"parts.{name}: ")


def _check_half(pipeline: Pipeline, half: Half, where: str) -> None:
    score = half.score or pipeline.score
    _check_end(score, half.segment or pipeline.segment, half.select, half.merge, half.model_fields_set, where)
    if half.budget is not None and score is None and getattr(half.budget, "scored", False):
        raise ValueError(f"{where}budget '{_name(half.budget)}' needs a score; give it one")


def _name(part: object) -> str:
    """Return the word of a part in a recipe, as far as its file tells it."""
    return type(part).__module__.rsplit(".", 1)[-1]
