"""How much of the visual tokens a step leaves: what a recipe or a user asks for, checked once, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError

RATIO_RULE = "ratio is the fraction removed, at least 0 and below 1"
KEEP_RULE = "keep is the tokens kept per span (an int, at least 1) or the fraction kept (a float above 0, at most 1)"
TOTAL_RULE = "total is the tokens kept of all spans of one prompt together (an int, at least 1)"
KEPT_RULE = "kept are cumulative fractions of the original tokens, above 0, at most 1, never rising"
RULES = {"ratio": RATIO_RULE, "keep": KEEP_RULE, "total": TOTAL_RULE, "kept": KEPT_RULE}
# Those that mean the same at one place and at several.
ANYWHERE = ("ratio", "keep", "total")

Unit = Literal["fraction", "tokens per span", "tokens per prompt"]


@dataclass(frozen=True)
class Amount:
    """One of four ways to say how much is left of the original tokens, or none where the rule decides.

    ratio: fraction removed, in [0, 1).
    keep: an int is the tokens kept of each span, at least 1; a float the fraction kept, in (0, 1].
    total: tokens kept of all spans of one prompt together, at least 1; they share it in proportion to their size.
    kept: fractions left after each of several stages, in (0, 1], never rising.

    Of the first three each may be a list, with one number for each row of the batch. A count is rounded half up, is at
    least one token of each span, and never more than there are.

    Raises:
        ConfigError: two are given, or a number is out of range.
    """

    ratio: float | tuple[float, ...] | None = None
    keep: float | tuple[float, ...] | None = None
    total: int | tuple[int, ...] | None = None
    kept: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given = self.given
        if len(given) > 1:
            raise ConfigError(_exclude(list(given)))
        for name, value in given.items():
            object.__setattr__(self, name, _fractions(value) if name == "kept" else _checked(name, value))

    @property
    def given(self) -> dict[str, Any]:
        """What was given, by its name; empty where the rule decides."""
        return {name: value for name in RULES if (value := getattr(self, name)) is not None}

    @property
    def by_row(self) -> bool:
        """True where each row of the batch has a number of its own."""
        return any(isinstance(getattr(self, name), tuple) for name in ANYWHERE)

    @property
    def left(self) -> tuple[tuple[Unit, float], ...]:
        """What is left in the end, with its unit: one entry, or one for each row; none where the rule decides."""
        return tuple(_left(name, value) for name, value in self._last())

    @property
    def fraction(self) -> float | None:
        """The smallest fraction that is asked for, None where none is."""
        return min((value for unit, value in self.left if unit == "fraction"), default=None)

    @property
    def counts_tokens(self) -> bool:
        """True where it says a number of tokens, for a row at least."""
        return any(unit != "fraction" for unit, _ in self.left)

    def of_rows(self, rows: int) -> tuple[Amount, ...]:
        """Return the amount of each row of a batch.

        Raises:
            ConfigError: it is a list of another length.
        """
        for name, value in self.given.items():
            if name != "kept" and isinstance(value, tuple):
                if len(value) != rows:
                    raise ConfigError(
                        f"{name}={list(value)} has {len(value)} numbers, and the batch has {rows} "
                        f"row{'s' if rows > 1 else ''}. Give one number for each row, in their order, or one for all."
                    )
                return tuple(replace(self, **{name: one}) for one in value)
        return (self,) * rows

    def of_prompt(self, lengths: Sequence[int], stage: int = 0, stages: int = 1) -> tuple[int, ...]:
        """Return how many tokens of each span of one prompt may be left after a stage; all where the rule decides.

        lengths: the spans' tokens before any cut. stage, stages: place in a schedule, geometric where `kept` does not
        say otherwise; the last stage leaves what is asked for, to the token.

        Raises:
            ConfigError: `total` is less than one token of each span.
        """
        if self.kept is not None:
            return tuple(ops.kept_count(length, keep=self.kept[stage]) for length in lengths)
        if self.total is not None:
            shares = self._shares(lengths)
            pairs = zip(lengths, shares, strict=True)
            return tuple(ops.stage_counts(length, stages, keep=share)[stage] for length, share in pairs)
        assert not isinstance(self.ratio, tuple)
        assert not isinstance(self.keep, tuple)
        return tuple(ops.stage_counts(length, stages, self.ratio, self.keep)[stage] for length in lengths)

    def _shares(self, lengths: Sequence[int]) -> tuple[int, ...]:
        assert isinstance(self.total, int)
        if self.total < len(lengths):
            raise ConfigError(
                f"total={self.total} is less than one token of each of the {len(lengths)} images and videos of a "
                f"prompt. Give at least {len(lengths)}, or ratio= (the fraction removed)."
            )
        return ops.share_counts(self.total, lengths)

    def _last(self) -> list[tuple[str, Any]]:
        """Return (name, number) of what is left in the end, for each row where they differ."""
        out: list[tuple[str, Any]] = []
        for name, value in self.given.items():
            values = value[-1:] if name == "kept" else value if isinstance(value, tuple) else (value,)
            out += [(name, one) for one in values]
        return out

    def to_yaml(self) -> dict[str, Any]:
        """Return it as the keys of a step."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in self.given.items()}

    def __str__(self) -> str:
        return "".join(f"{name}={value}" for name, value in self.to_yaml().items()) or "what the rule decides"


def _left(name: str, value: float) -> tuple[Unit, float]:
    if name == "ratio":
        return "fraction", 1.0 - value
    if name == "total":
        return "tokens per prompt", value
    return ("tokens per span" if isinstance(value, int) else "fraction"), value


def _exclude(names: list[str]) -> str:
    if "kept" in names:
        said = " and ".join(["kept", *(name for name in names if name != "kept")])
        return f"{said} exclude each other: kept already says what is left after each layer; give one of them"
    said = " and ".join(names)
    return f"{said} exclude each other: {'; '.join(RULES[name] for name in names)}; got {said}"


def _checked(name: str, value: Any) -> Any:
    """Return a number, or one for each row as a tuple; raises ConfigError where one is out of range."""
    if not isinstance(value, (list, tuple)):
        if not _right(name, value):
            raise ConfigError(f"{RULES[name]}, got {value!r}")
        return value
    if not value or not all(_right(name, one) for one in value):
        raise ConfigError(f"{RULES[name]}, or a list of such numbers, one for each row of the batch, got {value!r}")
    return tuple(value)


def _right(name: str, value: Any) -> bool:
    if not _number(value):
        return False
    if name == "ratio":
        return bool(0 <= value < 1)
    if isinstance(value, int):
        return value >= 1
    return name == "keep" and bool(0 < value <= 1)


def _fractions(value: Any) -> tuple[float, ...]:
    right = isinstance(value, (list, tuple)) and all(_number(one) and 0 < one <= 1 for one in value)
    if not right or not value or any(later > earlier for earlier, later in pairwise(value)):
        raise ConfigError(f"{KEPT_RULE}, one for each layer; got {value!r}")
    return tuple(float(one) for one in value)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


RULE_DECIDES = Amount()
