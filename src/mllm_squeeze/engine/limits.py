"""How many tokens of each span a cut may leave, and what is said where the rule leaves another number."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_squeeze.amount import Amount
from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.errors import ConfigError, SqueezeWarning
from mllm_squeeze.layout import Span, TokenLayout


def asked_of(session: Prefill, planned: PlannedCut, rows: Sequence[int]) -> dict[int, int] | None:
    """Return how many tokens each of some spans may have left, None where all of them may stay.

    rows: numbers of the spans. Separators that are kept or dropped anyway are not counted.

    Raises:
        ConfigError: the batch has another number of rows than the amount, or a prompt more spans than its total.
    """
    layout = session.layout
    whole = {n: _whole(planned.reducer.separators, layout.spans[n]) for n in rows}
    amounts = _amounts(session, layout, planned.amount)
    asked: dict[int, int] = {}
    for sample in dict.fromkeys(layout.spans[n].sample for n in rows):
        mine = [n for n in rows if layout.spans[n].sample == sample]
        lengths = [whole[n] for n in mine]
        asked.update(zip(mine, amounts[sample].of_prompt(lengths, planned.stage, planned.stages), strict=True))
    _warn_above(planned.name, [(amounts[layout.spans[n].sample], n) for n in rows], whole, layout)
    return None if asked == whole and not planned.decides else asked


def _amounts(session: Prefill, layout: TokenLayout, amount: Amount) -> list[Amount]:
    """Return the amount of each sample; generate() repeats a row for its beams, one copy behind the other."""
    rows = session.rows
    if rows is None or layout.batch % rows:
        rows = layout.batch
    return [one for one in amount.of_rows(rows) for _ in range(layout.batch // rows)]


def current_of(session: Prefill, separators: str, row: int) -> int:
    """Return how many tokens of a span a reducer may choose from now."""
    span, current = session.layout.spans[row], session.table.current[row]
    cells = _cells(span.tiles) or span.length
    # Other spans may have been cut before; of this one everything is there, separators too.
    if separators != "compete" and current == span.length:
        return cells
    return current - (span.length - cells) if separators == "keep" else current


def beside(session: Prefill, planned: PlannedCut, row: int, current: int) -> int:
    """Return how many tokens of a span stay without being asked for; current: those a reducer may choose from."""
    return 0 if planned.reducer.separators == "drop" else session.table.current[row] - current


def asked_in_encoder(session: Prefill, planned: PlannedCut, rows: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens each span was asked to keep by a reduction inside the encoder, its separators included.

    rows: numbers of the spans that it reduces.
    """
    out = list(session.table.current)
    for row in rows:
        span = session.layout.spans[row]
        cells = _cells(span.tiles) or span.length
        (asked,) = planned.amount.of_prompt((cells,))
        out[row] = asked + span.length - cells
    return tuple(out)


def require_reachable(
    session: Prefill, planned: PlannedCut, rows: Sequence[int], current: Sequence[int], asked: Sequence[int]
) -> None:
    """Raise ConfigError where a number of tokens is asked for that the rule cannot come down to."""
    if not planned.amount.counts_tokens:
        return
    for row, there, number in zip(rows, current, asked, strict=True):
        fewest = planned.reducer.fewest(there, session.layout.spans[row].tiles)
        if number < min(fewest, there):
            raise ConfigError(
                f"'{planned.name}' with {planned.amount} may leave {number} of the {there} tokens of a span, less than "
                f"the {fewest} that stay whatever is asked: {planned.facts.why_more}. Ask for more, or give "
                "fewer frames."
            )


def warn_left(
    session: Prefill,
    planned: PlannedCut,
    rows: Sequence[int],
    current: Sequence[int],
    asked: Sequence[int],
    counts: Sequence[int],
) -> None:
    """Warn where a rule leaves clearly more than asked: a tenth more, and more than each frame rounds up by.

    counts: tokens of all spans behind the cut.
    """
    if planned.decides:
        return
    for row, there, number in zip(rows, current, asked, strict=True):
        left = counts[row] - beside(session, planned, row, there)
        pieces = sum(tile.frames for tile in session.layout.spans[row].tiles)
        if left > number + max((pieces + 1) // 2, 1, number // 10):
            warn(
                f"'{planned.name}' was asked to leave {number} of the {there} tokens of a span, and leaves {left}: "
                f"{planned.facts.why_more}. Ask for less, give more frames, or use a method that keeps any "
                "number."
            )
            return


def warn(text: str) -> None:
    """Say that something had less effect than asked."""
    warnings.warn(text, SqueezeWarning, stacklevel=2)


def _whole(separators: str, span: Span) -> int:
    """Return how many of a span's tokens a budget speaks of."""
    return (_cells(span.tiles) or span.length) if separators == "keep" else span.length


def _cells(tiles: Sequence[Any]) -> int:
    return sum(tile.cells for tile in tiles)


def _warn_above(name: str, spans: Sequence[tuple[Amount, int]], whole: Mapping[int, int], layout: TokenLayout) -> None:
    """Warn where more tokens are asked for than there are; once in a cut."""
    together: dict[int, int] = {}
    for _, n in spans:
        together[layout.spans[n].sample] = together.get(layout.spans[n].sample, 0) + whole[n]
    for amount, n in spans:
        keep, total, there = amount.keep, amount.total, together[layout.spans[n].sample]
        if isinstance(keep, int) and keep > whole[n]:
            warn(
                f"'{name}' was asked to keep {keep} tokens of a span that has {whole[n]}; all of it is kept. Lower "
                "keep=, or give ratio= (the fraction removed)."
            )
            return
        if isinstance(total, int) and total > there:
            warn(
                f"'{name}' was asked to keep {total} tokens of a prompt whose spans have {there} together; all are "
                "kept. Lower total=, or give ratio= (the fraction removed)."
            )
            return
