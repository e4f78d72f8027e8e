"""`squeeze.choose` runs a rule on plain tensors, and says what it cannot make sense of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mllm_squeeze as squeeze
import tiny
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.needs import Attention, EncoderAttention

SCORES = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])


def kept(choice: squeeze.Choice) -> list[int]:
    assert isinstance(choice.kept, Tensor)
    return choice.kept.tolist()


def test_one_span_by_name_and_by_need() -> None:
    for key in ("attention", Attention()):
        choice = squeeze.choose("fastv", signals={key: SCORES}, ratio=0.5)
        assert kept(choice) == [1, 3, 5]
        assert choice.keep.tolist() == [False, True, False, True, False, True]
        assert choice.features is None


def test_a_batch_with_padding_keeps_what_each_row_keeps_alone() -> None:
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    signals: dict[Any, Tensor] = {"attention": torch.stack([SCORES, SCORES.flip(0)])}
    choice = squeeze.choose("fastv", signals=signals, mask=mask, ratio=0.5)
    assert [row.tolist() for row in choice.kept] == [[1, 3, 5], [0, 2]]
    alone = squeeze.choose("fastv", signals={"attention": SCORES.flip(0)[:4]}, ratio=0.5)
    assert kept(alone) == [0, 2]


def test_merged_features_are_those_of_the_survivors() -> None:
    features = torch.arange(6.0)[:, None]
    choice = squeeze.choose(
        "visionzip",
        features=features,
        signals={"encoder_attention": SCORES, "encoder_projection": torch.ones(6, 2)},
        keep=3,
        contextual=1 / 3,
    )
    # Tokens 1 and 3 are dominant; 0 is the target, to which the mean of 2, 4 and 5 is added.
    assert kept(choice) == [0, 1, 3]
    assert isinstance(choice.features, Tensor)
    torch.testing.assert_close(choice.features[:, 0], torch.tensor([11 / 3, 1.0, 3.0]))


def test_a_grid_stands_for_the_tokens_where_nothing_else_does() -> None:
    choice = squeeze.choose("uniform", grid=(4, 4), keep=4)
    assert len(kept(choice)) == 4
    tiles = [Tile(1, 2, 2), Tile(1, 2, 4)]
    assert len(kept(squeeze.choose("uniform", grid=tiles, keep=6))) == 6


def test_a_later_stage_counts_from_the_tokens_before_any_cut() -> None:
    row = torch.rand(32)
    choice = squeeze.choose("pyramiddrop", signals={"attention": row}, stage=1, before=64)
    assert len(kept(choice)) == 16


def test_it_chooses_what_the_model_keeps() -> None:
    t = tiny.load("llava")
    with squeeze.applied(t.model, "divprune", ratio=0.5) as handle:
        t.model(**t.inputs["image"])
        (cut,) = handle.cuts
    visual = t.visual(t.inputs["image"])[0].nonzero().flatten()
    features = t.model.model.get_image_features(t.inputs["image"]["pixel_values"]).pooler_output[0]
    choice = squeeze.choose("divprune", features=features.detach(), ratio=0.5)
    assert kept(choice) == torch.isin(visual, cut.kept[0]).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("fastv", {}, r"reads Attention\(\), which is not given.*signals="),
        ("fastv", {"signals": {"atention": SCORES}}, "no signal 'atention'.*Did you mean 'attention'"),
        ("fastv", {"signals": {"attention": SCORES}, "ratio": 2}, "below 1"),
        ("fastv", {"signals": {"attention": SCORES}, "features": torch.ones(5, 2)}, r"the same tokens.*6.*5"),
        ("fastv", {"signals": {"attention": SCORES}, "stage": 1}, "this one has 1, got 1"),
        ("fastv", {"signals": {"attention": SCORES}, "at": "projector"}, "no step at 'projector'.*layer 2"),
        ("dycoke", {"at": "cache decode"}, "step by step; that takes a model"),
        ("dycoke", {}, "has 2 steps; `choose` runs one. Give at=, one of: projector, cache decode"),
        ("uniform", {"grid": (2, 3, 4, 5)}, r"grid is \(height, width\)"),
        ("uniform", {}, "got nothing"),
    ],
)
def test_mistakes(method: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        squeeze.choose(method, **given)


def test_two_signals_of_one_name_are_told_apart_by_the_need() -> None:
    shallow, deep = EncoderAttention(block=0), EncoderAttention(block=-1)
    fused = {"of": [{"score": {"encoder_attention": {"block": 0}}}, {"score": {"encoder_attention": {"block": -1}}}]}
    method = {"method": "two", "steps": [{"at": "projector", "ratio": 0.5, "score": {"fused": fused}}]}
    with pytest.raises(ConfigError, match="2 signals of the name 'encoder_attention'"):
        squeeze.choose(method, signals={"encoder_attention": SCORES})
    choice = squeeze.choose(method, signals={shallow: SCORES, deep: -3 * SCORES})
    assert kept(choice) == [0, 2, 4]
