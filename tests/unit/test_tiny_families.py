"""The tiny models are sound: each runs on every kind of prompt, and a row of a padded batch says what it says alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

import cache_role
import tiny

TOLERANCE = 1e-5
# Kinds of prompt that stand in one batch; of each group those that the family has.
GROUPS = (
    ("image", "two_images", "text"),
    ("video", "two_videos", "text"),
    ("image", "image_video", "text"),
    ("audio", "two_audios", "text"),
    ("audio_image", "image", "audio"),
)
# Where the library itself says something else for a row of a mixed batch.
MIXED = {
    # Words without an image still look at the empty image that fills their row.
    ("mllama", "text"),
    # Sound goes through another projection when anything in the batch is an image.
    ("phi4_multimodal", "audio_image"),
    # The number of each image, an axis of its positions, is counted over the whole batch.
    ("hunyuan_vl", "two_images"),
}
MANY = 16
# One token stands for an image where the text model looks at it by cross-attention.
FEW = {"mllama": 1}


def parameters(grouped: bool) -> list[object]:
    """Return (family, kind) or (family, group); families that this transformers lacks are skipped by name."""
    out = []
    for family in tiny.FAMILIES:
        reason = f"transformers {transformers.__version__} has no {family}, or a package is missing that it needs"
        marks = () if tiny.available(family) else (pytest.mark.skip(reason=reason),)
        kinds = tiny.kinds(family)
        for what in groups(family, kinds) if grouped else kinds:
            name = what[0] if grouped else what
            out.append(pytest.param(family, what, id=f"{family}-{name}", marks=marks))
    return out


def groups(family: str, kinds: list[str]) -> list[tuple[str, ...]]:
    """Return the groups of kinds that this family can take in one batch."""
    out = []
    for group in GROUPS:
        here = tuple(k for k in group if k in kinds and (family, k) not in MIXED)
        if group[0] in here and len(here) > 1:
            out.append(here)
    return out


def first_arrays(inputs: tiny.Inputs) -> list[str]:
    """Return the names of the pixels and sounds among the inputs."""
    return [k for k, v in inputs.items() if v.is_floating_point() and ("pixel" in k or "features" in k)]


@torch.no_grad()
def logits(t: tiny.TinyModel, inputs: tiny.Inputs) -> Tensor:
    """Return the logits of a forward with inputs of its own."""
    return t.model(**{k: v.clone() for k, v in inputs.items()}).logits


@pytest.mark.parametrize(("family", "kind"), parameters(grouped=False))
def test_forward_and_generate(family: str, kind: str) -> None:
    """Both run; the logits depend on what is shown, and generate starts from the logits of forward."""
    t = tiny.load(family)
    inputs = t.inputs[kind]
    assert (kind == "text") == (not t.visual(inputs).any())
    plain = logits(t, inputs)
    assert torch.isfinite(plain).all()
    with torch.no_grad():
        out = t.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    assert len(out.logits) == 4
    assert torch.allclose(out.logits[0], plain[:, -1], atol=TOLERANCE)
    for name in first_arrays(inputs):
        other = {**inputs, name: inputs[name].flip(-1) * 1.3}
        assert (logits(t, other)[:, -1] - plain[:, -1]).abs().max() > 1e-3, f"{name} does not matter"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "kinds"), parameters(grouped=True))
def test_a_row_of_a_batch_is_the_prompt_alone(family: str, kinds: tuple[str, ...], side: str) -> None:
    """Rows of other lengths, sizes and numbers of pieces beside it change nothing."""
    t = tiny.load(family)
    batch = t.batch(kinds, side)
    together = logits(t, batch.inputs)
    if t.model.config.is_encoder_decoder or together.shape[1] == 1:
        pairs = [(together[b], logits(t, s)[0]) for b, s in enumerate(batch.singles)]
    else:
        pairs = []
        for b, (single, at) in enumerate(zip(batch.singles, batch.offsets, strict=True)):
            alone = logits(t, single)[0]
            pairs.append((together[b, at : at + alone.shape[0]], alone))
    for kind, (row, alone) in zip(kinds, pairs, strict=True):
        assert torch.allclose(row, alone, atol=TOLERANCE, rtol=0), f"{kind}: {(row - alone).abs().max():.1e}"


# Visual tokens of molmo2 and the whole prompt of PaliGemma look at what comes in later turns; encoder-decoders and the
# BLIP classes keep no cache of a conversation.
ONE_TURN = ("molmo2", "paligemma", "paligemma2", "blip_2", "blip_2_t5", "instructblip", "instructblipvideo")


# Wrong in transformers until it had Molmo 2: the masks of a later turn (sliding layers; images of other turns).
LATE_TURNS = ("gemma3_window", "mllama")
RECENT = hasattr(transformers, "Molmo2ForConditionalGeneration")


def conversations() -> list[object]:
    """Return (family, kind of piece) of those that talk on, with positions that a cache alone tells (no M-RoPE)."""
    out = []
    for family in tiny.FAMILIES:
        if family in ONE_TURN or (tiny.FAMILIES[family].token_types and "gemma" not in family):
            continue
        for kind in ("image", "video", "audio"):
            if kind in tiny.kinds(family) and "omni" not in family and "glm" not in family:
                reason = (
                    f"transformers {transformers.__version__} lacks {family}, or its masks of a later turn are wrong"
                )
                able = tiny.available(family) and (RECENT or family not in LATE_TURNS)
                marks = () if able else (pytest.mark.skip(reason=reason),)
                out.append(pytest.param(family, kind, id=f"{family}-{kind}", marks=marks))
    return out


@pytest.mark.parametrize(("family", "kind"), conversations())
@torch.no_grad()
def test_a_second_turn_continues_the_first(family: str, kind: str) -> None:
    """Fed on the cache of the first turn, a second picture, video or sound says what the whole conversation says."""
    t = tiny.load(family)
    answer = torch.tensor([[41, 42, 43]])
    turn = t.turn(t.inputs[kind], answer, 50, 51, f"{kind}:1", 52, 53, 54)
    whole = logits(t, turn.whole)
    cache = transformers.DynamicCache(config=t.model.config)
    seen = t.inputs[kind]["input_ids"].shape[1] + answer.shape[1]
    first = {**t.inputs[kind], "attention_mask": torch.ones_like(t.inputs[kind]["input_ids"])}
    t.model(**first, **cache_role.given(cache), use_cache=True)
    between = {"attention_mask": torch.ones(1, seen, dtype=torch.long)}
    if "cross_attention_mask" in first:
        between["cross_attention_mask"] = first["cross_attention_mask"][:, -1:].repeat(1, answer.shape[1], 1, 1)
    t.model(input_ids=answer, **cache_role.given(cache), use_cache=True, **between)
    new = {**turn.new, "attention_mask": turn.whole["attention_mask"]}
    second = t.model(**new, **cache_role.given(cache), use_cache=True).logits
    assert torch.allclose(second, whole[:, seen:], atol=TOLERANCE, rtol=0), f"{(second - whole[:, seen:]).abs().max()}"


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if tiny.kinds(name)])
def test_prompts_leave_something_to_cut(family: str) -> None:
    """The first prompt has enough placeholders, and text behind them; no model is needed to see it."""
    if not tiny.available(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    t = tiny.load(family)
    kind = tiny.kinds(family)[0]
    visual = t.visual(t.inputs[kind])[0]
    assert int(visual.sum()) >= FEW.get(family, MANY)
    assert int(visual.nonzero()[-1]) + 5 < len(visual)


@pytest.mark.parametrize(("family", "release"), [(n, r) for n, f in tiny.FAMILIES.items() for r in f.broken])
def test_what_a_release_cannot_run_it_cannot_run_squeezed_or_not(family: str, release: str) -> None:
    """Goes red where a family is left out of the tests for no reason."""
    if transformers.__version__ != release:
        pytest.skip(f"speaks of transformers {release}")
    t = tiny.load(family)
    with pytest.raises(AttributeError):
        t.model(**t.inputs["image"])


def test_the_core_families_are_the_first() -> None:
    """The matrix of the contract tests stands on these eight."""
    assert tuple(tiny.FAMILIES)[:8] == tiny.CORE_FAMILIES
    assert set(tiny.ALL_FAMILIES) <= set(tiny.FAMILIES)
