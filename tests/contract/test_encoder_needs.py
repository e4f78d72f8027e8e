"""Each option of the encoder's signals is what the dense tower, in eager, gives: maps, projections and states.

They are carried to the LLM's tokens by the mean over the patches that make each token, which gradients tell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from contract.test_encoder_signals import ENCODERS, blocks_of, features_of, influence
from mllm_squeeze.engine.encoder.blocks import block_of
from mllm_squeeze.engine.encoder.pushed import read_sensitivity
from mllm_squeeze.errors import ConfigError, UnsupportedModelError
from mllm_squeeze.family.structure import find_parts
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import (
    EncoderAttention,
    EncoderNeed,
    EncoderProjection,
    EncoderStates,
    Need,
    Place,
    Sensitivity,
)
from mllm_squeeze.registry import register_reducer, unregister_reducer

# With a CLS token; tiles and newlines; packed and windowed; shuffled pixels; tiles without CLS.
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl", "llava_onevision")
asked: list[EncoderNeed] = []
seen: list[VisualTokens] = []


class Reads(Reducer):
    """Keep the first tokens, and show what was asked for."""

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})

    def needs(self) -> tuple[Need, ...]:
        return tuple(asked)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        seen.append(tokens)
        return Reduction(tokens.mask & (tokens.mask.cumsum(1) <= tokens.budget[:, None]))


@pytest.fixture(autouse=True)
def reads() -> Iterator[None]:
    register_reducer("reads", Reads)
    seen.clear()
    try:
        yield
    finally:
        unregister_reducer("reads")
        asked.clear()


RECIPE = {"method": "mine", "steps": [{"reducer": "reads", "at": "projector", "keep": 5}]}


def read(t: tiny.TinyModel, inputs: tiny.Inputs, needs: Sequence[EncoderNeed]) -> list[dict[EncoderNeed, Tensor]]:
    """Return the signals of each span; tokens stand in the axis before the last of states, in the last of attention."""
    asked[:] = needs
    with squeeze.applied(t.model, RECIPE) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
        spans = handle.layout.spans
    (tokens,) = seen[-1:]
    out = []
    for row, span in enumerate(spans):
        cut = slice(None, span.length)
        out.append(
            {n: tokens[n][row][..., cut] if isinstance(n, EncoderAttention) else tokens[n][row, cut] for n in needs}
        )
    return out


class Dense:
    """What the tower computes in eager: of each block its maps, queries, keys, values and states."""

    def __init__(self, t: tiny.TinyModel, inputs: tiny.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = list(blocks_of(t))
        self.lead = int(ENCODERS[t.name][3])
        home = sys.modules[type(self.blocks[0]).__module__]
        original = home.eager_attention_forward
        self.calls: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        self.states: dict[int, Tensor] = {}

        def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = original(module, query, key, value, *args, **kwargs)
            for number, block in enumerate(self.blocks):
                if module in set(block.modules()):
                    self.calls.setdefault(number, []).append((query, key, value, out[1].float()))
            return out

        hooks = [
            block.register_forward_hook(lambda _, __, output, n=n: self.states.update({n: output}))
            for n, block in enumerate(self.blocks)
        ]
        with monkeypatch.context() as patch, matrix.attention(t.model, "eager"), torch.no_grad():
            patch.setattr(home, "eager_attention_forward", record)
            features_of(t, inputs)
        for hook in hooks:
            hook.remove()
        self.makers = torch.cat(influence(t, inputs)).float()

    def patches(self, values: Tensor) -> Tensor:
        """Return (patches, ...) of values (tiles, special + N, ...)."""
        return values[:, self.lead :].flatten(0, 1)

    def attention(self, need: EncoderAttention, number: int) -> Tensor:
        """Return (patches, H) of a block."""
        of_cls = need.rows == "cls" or (need.rows == "cls_or_all" and self.lead)
        maps = [call[3][:, :, 0] if of_cls else call[3].sum(2) for call in self.calls[number]]
        return torch.cat([self.patches(one.transpose(1, 2)) for one in maps])

    def projection(self, need: EncoderProjection, number: int) -> Tensor:
        """Return (patches, H, d) of a block."""
        place = ("query", "key", "value").index(need.what)
        found = [call[place].transpose(1, 2) for call in self.calls[number]]
        return torch.cat([self.patches(one[:, :1].expand_as(one) if need.cls else one) for one in found])

    def of_states(self, need: EncoderStates, number: int) -> Tensor:
        """Return (patches, D) of a block."""
        found = self.states[number]
        found = found if found.ndim == 3 else found[None]
        return self.patches(found[:, :1].expand_as(found) if need.cls else found)

    def expected(self, need: EncoderNeed, number: int) -> Tensor:
        """Return a signal of all LLM tokens, tokens first; separators have 0."""
        if isinstance(need, EncoderAttention):
            heads = self.attention(need, number)
            joined = {"sum": heads.sum(1), "mean": heads.mean(1), "max": heads.amax(1), "each": heads}[need.heads]
        elif isinstance(need, EncoderProjection):
            found = self.projection(need, number)
            joined = {"mean": found.mean(1), "concat": found.flatten(1), "each": found}[need.heads]
        else:
            assert isinstance(need, EncoderStates)
            joined = self.of_states(need, number)
        flat = joined.flatten(1) if joined.ndim > 1 else joined[:, None]
        carried = (self.makers @ flat) / self.makers.sum(1, keepdim=True).clamp(min=1)
        return carried.view(len(carried), *joined.shape[1:])


def options(cls: bool) -> list[EncoderNeed]:
    """Return needs of every option, several blocks at once."""
    needs: list[EncoderNeed] = [
        EncoderAttention(block=0, rows="all"),
        EncoderAttention(block=-1, rows="cls_or_all", heads="mean"),
        EncoderAttention(block=0, rows="cls_or_all", heads="max"),
        EncoderAttention(block=0, rows="all", heads="each"),
        EncoderProjection(block=0),
        EncoderProjection("query", block=0, heads="concat"),
        EncoderProjection("value", block=-1, heads="each"),
        EncoderStates(block=0),
        EncoderStates(block=-1),
    ]
    if cls:
        needs += [
            EncoderAttention(block=-1, rows="cls", heads="each"),
            EncoderProjection("query", block=-1, cls=True),
            EncoderStates(block=0, cls=True),
        ]
    return needs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["image", "two_images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_is_what_the_dense_tower_gives(
    family: str, kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny.load(family)
    dense = Dense(t, t.inputs[kind], monkeypatch)
    needs = options(bool(dense.lead))
    with matrix.attention(t.model, implementation):
        spans = read(t, t.inputs[kind], needs)
    real = dense.makers.sum(1) > 0
    for need in needs:
        block = getattr(need, "block", 0)
        expected = dense.expected(need, block % len(dense.blocks))
        found = [span[need] for span in spans]
        # Heads stand in front of the tokens.
        joined = torch.cat([one.T if isinstance(need, EncoderAttention) and one.ndim == 2 else one for one in found])
        torch.testing.assert_close(
            joined[real], expected[real], rtol=1e-4, atol=1e-5, msg=lambda m, n=need: f"{n}: {m}"
        )
        separator = -torch.inf if isinstance(need, EncoderAttention) else 0.0
        assert bool((joined[~real] == separator).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_feature_block_is_the_one_that_visionzip_reads(family: str) -> None:
    """By its number the block gives bit for bit what "feature" gives; of states it is the one that is projected."""
    t = tiny.load(family)
    _, number, last, _ = ENCODERS[family]
    needs = [EncoderAttention(), EncoderAttention(number), EncoderProjection(), EncoderProjection(block=number)]
    needs += [EncoderStates(), EncoderStates(last)]
    for span in read(t, t.inputs["image"], needs):
        for one, other in zip(needs[::2], needs[1::2], strict=True):
            assert torch.equal(span[one], span[other])


def with_head(name: str) -> tiny.TinyModel:
    """Return a tiny model whose SigLIP tower has its pooling head."""
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    t = tiny.fresh(name)
    tower: Any = t.model.get_submodule(t.family.tower)
    torch.manual_seed(0)
    tower.head = SiglipMultiheadAttentionPoolingHead(tower.config).eval()
    nn.init.normal_(tower.head.attention.in_proj_bias)
    return t


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
@pytest.mark.parametrize("heads", ["sum", "mean", "max", "each"])
def test_the_probe_is_the_query_of_the_pooling_head(family: str, heads: Any) -> None:
    t = with_head(family)
    tower: Any = t.model.get_submodule(t.family.tower)
    # The head's own module gives the weights of its one query.
    states: list[Tensor] = []
    hook = tower.encoder.layers[-1].register_forward_hook(lambda _, __, output: states.append(output))
    need = EncoderAttention(-1, rows="probe", heads=heads)
    (span, *_) = read(t, t.inputs["image"], [need])
    hook.remove()
    normed = tower.post_layernorm(states[0])
    probe = tower.head.probe.expand(len(normed), -1, -1)
    _, weights = tower.head.attention(probe, normed, normed, average_attn_weights=False)
    each = weights[:, :, 0]
    joined = {"sum": each.sum(1), "mean": each.mean(1), "max": each.amax(1), "each": each}[heads]
    mine = span[need]
    if family == "llava_onevision":
        # The first tile is the picture in small; what lies behind it is cropped.
        count = joined.shape[-1]
        torch.testing.assert_close(mine[..., :count], joined[0])
    else:
        side = int(joined.shape[-1] ** 0.5)
        grid = joined[0].reshape(1, -1, side, side)
        window = side // int(mine.shape[-1] ** 0.5)
        pooled = nn.functional.avg_pool2d(grid, window, window).flatten(2)[0]
        torch.testing.assert_close(mine, pooled if heads == "each" else pooled[0])


@pytest.mark.parametrize(
    ("family", "need", "error", "reason"),
    [
        ("qwen2_5_vl", EncoderAttention(rows="cls"), UnsupportedModelError, "has no CLS token"),
        ("llava_onevision", EncoderProjection(cls=True), UnsupportedModelError, "has no CLS token"),
        ("llava_onevision", EncoderStates(cls=True), UnsupportedModelError, "has no CLS token"),
        ("llava", EncoderAttention(rows="probe"), UnsupportedModelError, "no head that pools patches"),
        ("llava_onevision", EncoderAttention(rows="probe"), UnsupportedModelError, "no head that pools patches"),
        ("llava", EncoderAttention(3), ConfigError, "reads block 3 .* has 3 blocks. Give a number from 0 to 2"),
        ("llava", EncoderStates(1.5), ConfigError, "reads block 1.5 .* a fraction between 0 and 1 of the depth"),
        ("llava", EncoderStates(-4), ConfigError, "-1 to -3 from the last, a fraction between"),
    ],
)
def test_what_an_encoder_does_not_give_is_refused(family: str, need: Any, error: Any, reason: str) -> None:
    asked[:] = [need]
    with pytest.raises(error, match=reason):
        squeeze.apply(tiny.load(family).model, RECIPE)


def test_a_block_may_be_a_fraction_of_the_depth() -> None:
    parts = find_parts(tiny.load("llava").model)
    blocks = [block_of(EncoderAttention(share), parts) for share in (0.01, 0.33, 0.34, 0.67, 0.99)]
    assert blocks == [0, 0, 1, 2, 2]


def test_padding_is_no_query() -> None:
    """A picture that is padded to the size of its neighbour has the scores that it has alone."""
    t = tiny.load("lfm2_vl")
    needs = [EncoderAttention(0, "all"), EncoderAttention(1, "all", "max"), EncoderStates(0)]
    inputs = {k: v.clone() for k, v in t.inputs["image"].items()}
    alone = read(t, inputs, needs)
    for name in ("pixel_values", "pixel_attention_mask"):
        inputs[name] = nn.functional.pad(inputs[name], (0, 0, 0, 9) if inputs[name].ndim == 3 else (0, 9))
    padded = read(t, inputs, needs)
    for need in needs:
        torch.testing.assert_close(padded[0][need], alone[0][need], rtol=1e-4, atol=1e-5)


def test_signals_of_a_tower_that_another_step_shortens_are_refused() -> None:
    asked[:] = [EncoderAttention()]
    merging = {"at": {"encoder": "all"}, "ratio": 0.25, "merge": "bipartite"}
    with pytest.raises(UnsupportedModelError, match=r"reads EncoderAttention\(\) there for a later step"):
        squeeze.apply(tiny.load("llava").model, {"method": "both", "steps": [merging, *RECIPE["steps"]]})


@pytest.mark.parametrize("factor", [0.0, 1.02, 1e6])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_what_outliers_look_at(family: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the rows of those tokens that receive more than so many times the average; of all where none does."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    dense = Dense(t, inputs, monkeypatch)
    need = EncoderAttention(block=1, rows="outliers", heads="mean", factor=factor)
    found = []
    for call in dense.calls[1]:
        for one in call[3].mean(1):
            outliers = one.sum(0) > factor
            rows = one[outliers] if bool(outliers.any()) else one
            found.append(rows.mean(0)[dense.lead :])
    theirs = dense.makers @ torch.cat(found) / dense.makers.sum(1)
    (ours,) = (signals[need] for signals in read(t, inputs, [need]))
    there = ours.isfinite()
    assert int(there.sum()) == int((dense.makers.sum(1) > 0).sum())
    oracle.assert_close(ours[there], theirs[dense.makers.sum(1) > 0], str(need))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_other_patches_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over all rows but the key's own and that of the CLS token."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    dense = Dense(t, inputs, monkeypatch)
    need = EncoderAttention(block=1, rows="others", heads="mean")
    found = []
    for call in dense.calls[1]:
        for one in call[3].mean(1):
            patches = one[dense.lead :, dense.lead :]
            found.append(patches.masked_fill(torch.eye(len(patches), dtype=torch.bool), 0).sum(0))
    theirs = dense.makers @ torch.cat(found) / dense.makers.sum(1)
    (ours,) = (signals[need] for signals in read(t, inputs, [need]))
    there = ours.isfinite()
    assert int(there.sum()) == int((dense.makers.sum(1) > 0).sum())
    oracle.assert_close(ours[there], theirs[dense.makers.sum(1) > 0], str(need))


PUSHED = (
    "llava",
    "vipllava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "pixtral",
    "paligemma",
    "paligemma2",
    "deepseek_vl",
    "janus",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen2_5_omni",
    "qwen3_omni_moe",
    "glm4v",
    "glm46v",
    "glmga",
    "glm_ocr",
    "exaone4_5",
    "hyperclovax_vision_v2",
    "cohere_compass",
    "lfm3_vl",
    "cosmos3_omni",
    "cosmos3_edge",
    "minimax_m3_vl",
)


@pytest.mark.parametrize("family", [name for name in PUSHED if tiny.available(name)])
def test_what_the_projector_answers(family: str) -> None:
    """A push of all that the projector gets moves the features of the LLM: what it does to each is the signal."""
    t = tiny.load(family)
    inputs, need = t.inputs["image"], Sensitivity(3, 0.05, 7)
    projector = find_parts(t.model).projector
    assert projector is not None
    push: list[Tensor] = []

    def pushed(_: Any, args: Any) -> Any:
        width = args[0].shape[-1]
        noise = torch.randn(3, width, generator=torch.Generator().manual_seed(7))
        push[:] = [sign * 0.05 * one / one.norm() for one in noise for sign in (1, -1)]
        return (args[0] + push[number], *args[1:])

    found = []
    hook = projector.register_forward_pre_hook(pushed)
    with torch.no_grad():
        for number in range(6):  # noqa: B007
            found.append(torch.cat([one.reshape(-1, one.shape[-1]) for one in features_of(t, inputs)]))
    hook.remove()
    theirs = sum((found[n] - found[n + 1]).norm(dim=-1) for n in (0, 2, 4)) / (3 * 0.1)
    (ours,) = (signals[need] for signals in read(t, inputs, [need]))
    there = ours.isfinite()
    assert bool((theirs[~there] == 0).all()) and bool((theirs[there] > 0).all())
    torch.testing.assert_close(ours[there], theirs[there], rtol=2e-3, atol=1e-4)


def test_pushes_leave_the_hooks_of_others_alone() -> None:
    """The projector runs once, as far as others can see."""
    t = tiny.load("llava")
    projector = find_parts(t.model).projector
    assert projector is not None
    asked[:] = [Sensitivity(2)]
    called: list[int] = []
    with squeeze.applied(t.model, RECIPE), torch.no_grad():
        hook = projector.register_forward_hook(lambda *_: called.append(1))
        t.model(**t.inputs["image"])
        hook.remove()
    assert len(called) == 1


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("internvl", "joins tokens in a way"),
        ("gemma3", "joins tokens in a way"),
        ("ernie4_5_vl_moe", "its projector was not found"),
    ],
)
def test_pushes_are_refused_where_they_say_nothing_of_a_token(family: str, says: str) -> None:
    asked[:] = [Sensitivity()]
    with pytest.raises(UnsupportedModelError, match=f"how the projector answers to pushes.*{says}"):
        squeeze.apply(tiny.load(family).model, RECIPE)


def test_pushes_are_refused_where_the_weights_are_not_there() -> None:
    parts = find_parts(tiny.load("llava").model)
    with pytest.raises(UnsupportedModelError, match="its weights are offloaded"):
        read_sensitivity(Sensitivity(1), nn.Linear(4, 4, device="meta"), torch.zeros(2, 4), parts)
