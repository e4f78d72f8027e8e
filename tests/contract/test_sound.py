"""Signals of the audio encoder against the formula, and videos whose sound stands between their frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mllm_squeeze as squeeze
import oracle
import tiny
from contract.test_equivalence import check_cuts, squeeze_and_prove
from mllm_squeeze.errors import UnsupportedInputError, UnsupportedModelError
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place, Runs, SoundAttention
from mllm_squeeze.reducers.sound_guided import SoundGuided
from mllm_squeeze.registry import register_reducer, unregister_reducer
from tiny.moe_line import AUDIO_END, AUDIO_START, _sound
from tiny.parts import AFTER, AUDIO, END, START, VIDEO
from tiny.prompts import Sample, collate, sample

FAMILIES = ("qwen2_5_omni", "qwen3_omni_moe")
RECIPE = {"method": "mine", "steps": [{"reducer": "hears", "at": "projector", "keep": 5}]}
seen: list[VisualTokens] = []


class Hears(Reducer):
    """Keep the first tokens, and show what the encoder of sound attends to."""

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})

    def needs(self) -> tuple[Need, ...]:
        return (Features(), SoundAttention(), Runs())

    def reduce(self, tokens: VisualTokens) -> Reduction:
        seen.append(tokens)
        return Reduction(tokens.mask & (tokens.mask.cumsum(1) <= tokens.budget[:, None]))


@pytest.fixture(autouse=True)
def hears() -> Iterator[None]:
    register_reducer("hears", Hears)
    seen.clear()
    try:
        yield
    finally:
        unregister_reducer("hears")


@pytest.fixture(autouse=True)
def plain_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all tokens positions in a row; those of videos with sound are the processor's affair."""

    def positions(model: Any, inputs: tiny.Inputs, steps: int) -> Tensor:
        mask = inputs["attention_mask"]
        after = torch.arange(steps) + mask.sum(-1, keepdim=True)
        return torch.cat([(mask.cumsum(-1) - 1).clamp(min=0), after], -1).expand(3, -1, -1)

    monkeypatch.setattr(oracle, "positions", positions)


def heard(t: tiny.TinyModel, inputs: tiny.Inputs) -> list[Tensor]:
    """Return the signal of each span."""
    with squeeze.applied(t.model, RECIPE) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(len(inputs["input_ids"]), 0))
        lengths = [span.length for span in handle.layout.spans]
    return [row[:length] for row, length in zip(seen[-1][SoundAttention()], lengths, strict=True)]


def by_formula(t: tiny.TinyModel, inputs: tiny.Inputs) -> Tensor:
    """Return what the tokens of the encoder receive in its last block, all of them in one softmax."""
    attention = t.model.model.audio_tower.layers[-1].self_attn
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: read.__setitem__(name, output.detach())

    hooks = [getattr(attention, f"{name}_proj").register_forward_hook(keep(name)) for name in ("q", "k")]
    oracle.run(t.model, inputs, oracle.forced_tokens(len(inputs["input_ids"]), 0))
    for hook in hooks:
        hook.remove()
    query, key = (read[name].unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for name in ("q", "k"))
    weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
    return weights.mean((0, 1))


@pytest.mark.parametrize("kind", ["audio", "two_audios", "audio_image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_audio_encoder_attends_to_is_its_formula(family: str, kind: str) -> None:
    t = tiny.load(family)
    inputs = t.inputs[kind]
    found = torch.cat([one for one in heard(t, inputs) if one.any()])
    expected = by_formula(t, inputs)
    if family == "qwen2_5_omni":
        expected = expected.view(-1, 2).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_token_of_the_encoder_that_makes_none_is_left_out(implementation: str) -> None:
    """38 frames become 19 tokens of the encoder and nine of the LLM; the last one counts in the softmax only."""
    t = tiny.load("qwen2_5_omni")
    piece = _sound(5, 38, 9)
    inputs = collate(t.family, [Sample((*t.family.before, *piece.ids, *AFTER), (piece.arrays,))])
    t.model.set_attn_implementation(implementation)
    try:
        (found,) = heard(t, inputs)
        expected = by_formula(t, inputs)
    finally:
        t.model.set_attn_implementation("sdpa")
    assert len(expected) == 19
    torch.testing.assert_close(found, expected[:18].view(-1, 2).mean(1), rtol=1e-4, atol=1e-7)


def test_a_prompt_hears_what_it_hears_alone() -> None:
    t = tiny.load("qwen2_5_omni")
    prompts = [sample(t.family, "audio:0"), sample(t.family, "audio:1", 31, "audio:2")]
    for side in ("left", "right"):
        together = heard(t, collate(t.family, prompts, side))
        alone = [one for prompt in prompts for one in heard(t, collate(t.family, [prompt]))]
        assert len(together) == len(alone) == 3
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def interleaved(t: tiny.TinyModel) -> Sample:
    """Return a prompt of a video of 32 tokens in two runs, each with sound behind it, as omni models take them."""
    video, sound = (sample(t.family, f"{kind}:0", bare=True).arrays[0] for kind in ("video", "audio"))
    count = sample(t.family, "audio:0", bare=True).ids.count(AUDIO)
    runs = ((VIDEO,) * 16, (AUDIO,) * 11, (VIDEO,) * 16, (AUDIO,) * (count - 11))
    ids = (START, AUDIO_START, *(one for run in runs for one in run), AUDIO_END, END)
    return Sample((*t.family.before, *ids, *AFTER), (video, sound))


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_a_video_with_sound(family: str) -> None:
    t = tiny.load(family)
    heard(t, collate(t.family, [interleaved(t)]))
    tokens = seen[-1]
    assert tokens.modality == ("video", "audio", "audio")
    assert tokens[Runs()][0].tolist() == [0] * 16 + [1] * 16
    assert not tokens[Runs()][1:][tokens.mask[1:]].any()
    assert not tokens[SoundAttention()][0].any()


def test_a_hidden_token_parts_a_run() -> None:
    """The fourth token of the first run is hidden; the others know their places as if it was there."""
    t = tiny.load("qwen2_5_omni")
    inputs = collate(t.family, [interleaved(t)])
    fourth = (inputs["input_ids"][0] == VIDEO).nonzero().flatten()[3]
    inputs["attention_mask"][0, fourth] = 0
    heard(t, inputs)
    runs = seen[-1][Runs()][0][seen[-1].mask[0]]
    assert runs.tolist() == [0] * 3 + [1] * 12 + [2] * 16


@pytest.mark.parametrize("changes", [{}, {"ratio": 0.5}, {"ratio": 0.0}, {"sound": 0.6, "context": 0.1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_with_sound_is_cut_exactly(family: str, changes: dict[str, float]) -> None:
    """A cut equals masking, and anchors take up sound of other runs as the rule says."""
    t = tiny.load(family)
    inputs = collate(t.family, [interleaved(t)])
    if changes.get("ratio") == 0.0:
        forced = oracle.forced_tokens(1, 3)
        dense = oracle.run(t.model, inputs, forced)
        with squeeze.applied(t.model, "omnizip", ratio=0.0):
            assert torch.equal(oracle.run(t.model, inputs, forced).prefill, dense.prefill)
        return
    heard(t, inputs)
    tokens = seen[-1]
    with squeeze.applied(t.model, "omnizip", **changes) as handle, oracle.capture(t.model, range(1)) as states:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
    check_cuts(t, inputs, handle)
    if "ratio" not in changes:
        rule = SoundGuided(**changes)
        found = rule.reduce(without_budget(tokens))
        column = [torch.tensor(span.columns) for span in handle.layout.spans]
        expected = found.states(tokens.features)
        kept = handle.cuts[0].kept[0].tolist()
        for row, columns in enumerate(column):
            stays = found.keep[row, : len(columns)]
            assert set(kept) & set(columns.tolist()) == set(columns[stays].tolist())
            places = [kept.index(one) for one in columns[stays].tolist()]
            torch.testing.assert_close(states[0][0, places], expected[row, : len(columns)][stays])
    squeeze_and_prove(t, inputs, "omnizip", **changes)


def without_budget(tokens: VisualTokens) -> VisualTokens:
    return replace(tokens, asked=False, counts=tokens.current)


def test_a_batch_of_videos_with_sound_is_what_each_is_alone() -> None:
    t = tiny.load("qwen2_5_omni")
    prompts = [interleaved(t), sample(t.family, "audio:1", 33, "video:1")]
    kept = []
    for group in ([0, 1], [0], [1]):
        inputs = collate(t.family, [prompts[n] for n in group], side="right")
        with squeeze.applied(t.model, "omnizip") as handle:
            oracle.run(t.model, inputs, oracle.forced_tokens(len(group), 0))
            kept += [row.tolist() for row in handle.cuts[0].kept]
    assert kept[:2] == kept[2:]


@pytest.mark.parametrize(
    ("family", "reason"),
    [("voxtral", "pads recordings"), ("qwen2_audio", "get_audio_features"), ("llava_onevision", "was not found")],
)
def test_what_gives_no_such_signal_is_refused(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        squeeze.apply(tiny.load(family).model, "omnizip")


def test_hidden_sound_is_refused() -> None:
    t = tiny.load("qwen2_5_omni")
    inputs = {name: value.clone() for name, value in t.inputs["audio"].items()}
    inputs["attention_mask"][0, (inputs["input_ids"][0] == AUDIO).nonzero()[3]] = 0
    with (
        squeeze.applied(t.model, "omnizip"),
        pytest.raises(UnsupportedInputError, match="17 tokens of sound, of which 18"),
    ):
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
