"""Which parts go together in a pipeline, and the sentences that say which do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mllm_squeeze.errors import did_you_mean
from mllm_squeeze.parts.base import Budget, Merge, Score, Segment, Select
from mllm_squeeze.parts.segment.whole import Whole
from mllm_squeeze.parts.stage import Half


@dataclass(frozen=True)
class Given:
    """The parts of a pipeline, and the keys of a recipe that gave them."""

    score: Score | None
    segment: Segment
    budget: Budget
    select: Select
    merge: Merge | None
    halves: Mapping[str, Half]
    keys: set[str]


def check_parts(given: Given) -> None:
    """Raise ValueError where the parts of a pipeline do not go together."""
    if given.halves or given.segment.parts:
        _check_halves(given)
    else:
        _check_end(given.score, given.segment, given.select, given.merge, given.keys)
    if given.score is None and given.budget.scored:
        raise ValueError(f"budget '{_name(given.budget)}' needs a score; give the step one")


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


def _check_halves(given: Given) -> None:
    names, segment = given.segment.parts, _name(given.segment)
    if not names:
        raise ValueError(
            f"segment '{segment}' tells no parts apart, so there can be no parts ({', '.join(given.halves)}); use a "
            "segment that does, like stillness"
        )
    for name in given.halves:
        if name not in names:
            raise ValueError(f"parts: unknown part '{name}'. {did_you_mean(name, names)}")
    missing = " and ".join(name for name in names if name not in given.halves)
    if missing:
        raise ValueError(f"segment '{segment}' tells {' and '.join(names)} apart; parts lacks {missing}")
    rivals = " and ".join(sorted({"select", "merge"} & given.keys))
    if rivals:
        raise ValueError(f"{rivals} stands in each of parts, not beside it")
    for name, half in given.halves.items():
        _check_half(given, half, f"parts.{name}: ")


def _check_half(given: Given, half: Half, where: str) -> None:
    score = half.score or given.score
    _check_end(score, half.segment or given.segment, half.select, half.merge, half.model_fields_set, where)
    if half.segment is not None and half.segment.parts:
        raise ValueError(
            f"{where}segment '{_name(half.segment)}' tells parts apart; it stands beside parts, not inside"
        )
    if half.budget is not None and score is None and half.budget.scored:
        raise ValueError(f"{where}budget '{_name(half.budget)}' needs a score; give it one")


def _name(part: object) -> str:
    """Return the word of a part in a recipe, as far as its file tells it."""
    return type(part).__module__.rsplit(".", 1)[-1]
