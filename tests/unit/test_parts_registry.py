"""Parts by name: those of others, what is wrong with a recipe of parts, and recipes that come back as they were."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import yaml
from reference.build import chosen, visual_tokens

import mllm_squeeze as squeeze
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need


class Loudness(Score):
    """Score a token by its largest channel.

    scale: what it is multiplied with.
    """

    main: ClassVar[str | None] = "scale"

    scale: float = 1.0

    def needs(self) -> tuple[Need, ...]:
        """Return the states."""
        return (Features(),)

    def score(self, tokens: VisualTokens, groups: Groups) -> torch.Tensor:
        """Return the largest channel."""
        return tokens.features.amax(-1) * self.scale


def recipe(**step: Any) -> dict[str, Any]:
    return {"method": "mine", "steps": [{"at": "projector", "ratio": 0.5, **step}]}


@pytest.fixture
def loudness():
    squeeze.register_part("loudness", Loudness)
    yield
    squeeze.unregister_part("score", "loudness")


def test_a_part_of_this_process_is_used_like_one_that_ships(loudness):
    (step,) = load_recipe(recipe(score={"loudness": -1.0}, select="top_k")).steps
    tokens = visual_tokens([torch.tensor([[1.0, 5], [3, 2], [0, 1]])], [2])
    assert chosen(step.built.reduce(tokens).keep) == [1, 2]
    assert step.built.needs() == (Features(),)
    assert step.rule == "loudness + top_k"


def test_a_part_is_taken_back_and_its_name_is_free_again(loudness):
    with pytest.raises(squeeze.ConfigError, match="score part name 'norm' is taken"):
        squeeze.register_part("norm", Loudness)
    with pytest.raises(squeeze.ConfigError, match="must subclass a part"):
        squeeze.register_part("loud", dict)
    squeeze.unregister_part("score", "loudness")
    with pytest.raises(squeeze.UnknownNameError, match=r"No part 'score\.loudness'"):
        squeeze.unregister_part("score", "loudness")
    with pytest.raises(squeeze.ConfigError, match="Unknown score 'loudness'"):
        load_recipe(recipe(score="loudness"))
    squeeze.register_part("loudness", Loudness)


MISTAKES = [
    ({"select": "topk"}, ["step 1: select: Unknown select 'topk'", "Did you mean 'top_k'?"]),
    ({"scor": "norm"}, ["step 1: unknown key 'scor'", "Did you mean 'score'?"]),
    ({"score": {"norm": {"ordr": 2}}}, ["step 1: score: unknown key 'ordr'", "of, order, sign", "mean 'order'?"]),
    ({"score": {"norm": "key"}}, ["step 1: score.of:", "'keys'", "got 'key'. Did you mean 'keys'?"]),
    ({"select": {"in_turn": [{"slect": "top_k"}]}}, ["select.of.0: unknown key 'slect'", "Did you mean 'select'?"]),
    ({"select": {"in_turn": [{"select": "topk"}]}}, ["step 1: select.of.0.select: Unknown select 'topk'"]),
    ({"score": {"fused": [{"score": "nrm"}]}}, ["step 1: score.of.0.score: Unknown score 'nrm'", "mean 'norm'?"]),
    ({"score": {"fused": []}}, ["step 1: score: of is a list of at least one"]),
    ({"select": 3}, ["step 1: select: give one name", "got 3"]),
    ({"select": "threshold"}, ["step 1: the key 'select.above' is missing"]),
    ({"select": {"threshold": 0.5}}, ["step 1: select 'threshold' picks by a score"]),
    ({"budget": "softmax"}, ["step 1: budget 'softmax' needs a score"]),
    ({"budget": {"fixed": 0}}, ["step 1: budget.keep:", "got 0"]),
    ({"merge": "pool", "select": "top_k"}, ["step 1: merge 'pool' picks the survivors itself; leave select out"]),
    ({"merge": "pool", "segment": "frame"}, ["step 1: merge 'pool' works on whole spans; leave segment out"]),
    ({"segment": "stillness"}, ["tells static and dynamic apart; parts lacks static and dynamic"]),
    ({"segment": "frame", "parts": {"static": {}}}, ["segment 'frame' tells no parts apart"]),
    ({"segment": "stillness", "parts": {"sttic": {}}}, ["parts: unknown part 'sttic'", "Did you mean 'static'?"]),
    (
        {"segment": "stillness", "parts": {"static": {"selct": "top_k"}, "dynamic": {}}},
        ["step 1: parts.static: unknown key 'selct'", "Did you mean 'select'?"],
    ),
    (
        {"segment": "stillness", "parts": {"static": {}, "dynamic": {}}, "select": "top_k"},
        ["step 1: select stands in each of parts"],
    ),
    ({"score": "attention"}, ["'attention' cannot act at projector", "Its places are: layer"]),
]


@pytest.mark.parametrize(("step", "says"), MISTAKES, ids=[str(step) for step, _ in MISTAKES])
def test_a_mistake_names_the_step_and_the_part(step, says):
    with pytest.raises(squeeze.ConfigError) as caught:
        load_recipe(recipe(**step))
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["fastv", "visionzip", "vidcom2", "dart", "tome"])
def test_recipes_of_parts_come_back_as_they_were(name):
    first = load_recipe(name)
    again = load_recipe(yaml.safe_load(first.to_yaml()))
    assert again == first
    assert [step.built for step in again.steps] == [step.built for step in first.steps]
    plain = squeeze.describe(name)
    assert "reducer" not in plain["steps"][0]
    described = load_recipe({key: plain[key] for key in ("method", "summary", "positions", "steps")})
    assert [step.model_dump() for step in described.steps] == [step.model_dump() for step in first.steps]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"paper": {}}, "holds a table of values"),
        ({"paper": {"order": 1}, "official": {"oder": 2}}, "gives values to the same names"),
        ({"paper": {"variant": 1}}, "is a param and a value"),
        ({"paper": {"order": 1}}, "unknown variant 'official'. Allowed: paper"),
        ({"official": {"order": 1, "spare": 2}}, "'spare' is not used"),
    ],
)
def test_variants_that_do_not_fit(tables, says):
    given = recipe(score={"norm": {"order": "${order}"}}) | {"params": {"variant": "official"}, "variants": tables}
    with pytest.raises(squeeze.ConfigError, match=says):
        load_recipe(given)
