"""How much a step leaves: what may be asked for, and the counts that it comes to."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mllm_squeeze.amount import RULE_DECIDES, Amount
from mllm_squeeze.errors import ConfigError

NAN, INFINITE = float("nan"), float("inf")
WRONG: dict[str, tuple[Any, ...]] = {
    "ratio": (1, 1.0, -0.1, 50, NAN, INFINITE, True, "half", "0.5", [], [0.5, 1.0], [0.5, None], [[0.5]], {0.5}),
    "keep": (0, -3, 0.0, 1.5, NAN, INFINITE, False, "64", [], [64, 0], [0.5, "64"], {"a": 1}),
    "total": (0, -3, 0.5, 64.0, NAN, True, "64", [], [64, 0], [64, 1.0]),
    "kept": (0.5, [], [0.5, 0.6], [1.5], [0.0], [NAN], [True], ["half"], "0.5", [[0.5]]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_out_of_range_says_what_was_given_and_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Amount(**{name: value})
    said = str(caught.value)
    assert said.startswith((f"{name} is ", f"{name} are "))
    assert said.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("two", "says"),
    [
        ({"ratio": 0.5, "keep": 3}, "ratio and keep exclude each other: ratio is .*; keep is .*; got ratio and keep"),
        ({"keep": 3, "total": 3}, "keep and total exclude each other"),
        ({"ratio": 0.5, "keep": 3, "total": 3}, "ratio and keep and total exclude each other"),
        ({"total": 3, "kept": [0.5]}, "kept and total exclude each other: kept already says"),
    ],
)
def test_one_way_at_a_time(two: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Amount(**two)


def test_lists_are_frozen_and_equal_by_value() -> None:
    given = [0.5, 0.9]
    amount = Amount(ratio=given)  # type: ignore[arg-type]
    given[0] = 0.1
    assert amount == Amount(ratio=(0.5, 0.9)) and hash(amount) == hash(Amount(ratio=(0.5, 0.9)))
    assert amount.to_yaml() == {"ratio": [0.5, 0.9]}
    assert str(amount) == "ratio=[0.5, 0.9]"
    assert Amount(kept=[1, 0.5]).kept == (1.0, 0.5)  # type: ignore[arg-type]


def test_nothing_given_leaves_all() -> None:
    assert RULE_DECIDES.given == {} and RULE_DECIDES.left == () and RULE_DECIDES.fraction is None
    assert RULE_DECIDES.of_prompt((5, 1, 9), 1, 3) == (5, 1, 9)


def test_what_is_left_and_its_unit() -> None:
    assert Amount(ratio=(0.5, 0.75)).left == (("fraction", 0.5), ("fraction", 0.25))
    assert Amount(keep=(64, 0.25)).left == (("tokens per span", 64), ("fraction", 0.25))
    assert Amount(total=96).left == (("tokens per prompt", 96),)
    assert Amount(kept=(0.5, 0.2)).left == (("fraction", 0.2),)
    assert [Amount(keep=k).fraction for k in (64, 0.25, (64, 0.25), (0.5, 0.25))] == [None, 0.25, 0.25, 0.25]
    assert [a.counts_tokens for a in (Amount(keep=1), Amount(keep=1.0), Amount(total=1))] == [True, False, True]


def test_one_number_for_each_row() -> None:
    amount = Amount(keep=(64, 0.25))
    assert amount.of_rows(2) == (Amount(keep=64), Amount(keep=0.25))
    assert Amount(keep=64).of_rows(2) == (Amount(keep=64),) * 2
    assert Amount(kept=(0.5, 0.2)).of_rows(3) == (Amount(kept=(0.5, 0.2)),) * 3
    for rows in (1, 3):
        with pytest.raises(
            ConfigError, match=rf"keep=\[64, 0.25\] has 2 numbers, and the batch has {rows} row.*one for all"
        ):
            amount.of_rows(rows)


@pytest.mark.parametrize("seed", range(20))
def test_a_total_is_met_to_the_token_whatever_the_schedule(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, rng.choice((3, 40, 700))) for _ in range(rng.randint(1, 6))]
    stages = rng.randint(1, 4)
    for total in {len(lengths), sum(lengths), *(rng.randint(len(lengths), sum(lengths)) for _ in range(20))}:
        steps = [Amount(total=total).of_prompt(lengths, stage, stages) for stage in range(stages)]
        assert sum(steps[-1]) == total
        for before, after in zip([tuple(lengths), *steps], steps, strict=False):
            assert all(1 <= now <= then for then, now in zip(before, after, strict=True))


def test_a_total_that_is_too_much_or_too_little() -> None:
    assert Amount(total=100).of_prompt((5, 9)) == (5, 9)
    with pytest.raises(ConfigError, match="total=2 is less than one token of each of the 3 images.*at least 3"):
        Amount(total=2).of_prompt((5, 9, 4))


def test_spans_have_a_budget_each_in_every_other_way() -> None:
    assert Amount(ratio=0.5).of_prompt((5, 8)) == (3, 4)  # 2.5 rounds half up
    assert Amount(keep=4).of_prompt((3, 8)) == (3, 4)
    assert Amount(keep=0.01).of_prompt((3, 8)) == (1, 1)
    assert Amount(ratio=0.875).of_prompt((576,), 1, 3) == (144,)
    assert [Amount(kept=(0.5, 0.2)).of_prompt((10,), stage, 2) for stage in (0, 1)] == [(5,), (2,)]
