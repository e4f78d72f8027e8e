"""Rules of somebody else: one decides its own count, one reads two signals of one name, one prunes in the encoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import matrix
import mllm_squeeze as squeeze
import oracle
import tiny
from mllm_squeeze.errors import ConfigError, SqueezeWarning, UnsupportedModelError
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.base import DecodeReducer, Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Attention, Features, Need, Normed, Place, Size
from mllm_squeeze.registry import register_reducer, unregister_reducer

LLM: frozenset[Place] = frozenset({"projector", "layer"})
LAST, WORDS = Attention(rows="last"), Attention(rows="text")
seen: list[Any] = []


class AboveAverage(Reducer):
    """Keep the tokens of more than average norm; in a span of at most `none_of` tokens keep none."""

    places: ClassVar[frozenset[Place]] = LLM
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    none_of: int = 0

    def needs(self) -> tuple[Need, ...]:
        return (Features(),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        seen.append(tokens)
        norms = tokens.features.norm(dim=-1).masked_fill(~tokens.mask, 0)
        average = norms.sum(1, keepdim=True) / tokens.mask.sum(1, keepdim=True)
        few = tokens.mask.sum(1, keepdim=True) <= self.none_of
        return Reduction((norms > average) & tokens.mask & ~few)


class TwoRows(Reducer):
    """Keep what the last token attends to more than the words do on average."""

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    unasked: bool = False

    def needs(self) -> tuple[Need, ...]:
        return (LAST, WORDS)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        if self.unasked:
            return Reduction(tokens[Attention("next")] > 0)
        score = tokens[LAST] - tokens[WORDS]
        seen.append(score)
        order = score.masked_fill(~tokens.mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        return Reduction((rank < tokens.budget[:, None]) & tokens.mask)


class Pairs(Reducer):
    """Merge every odd token of a span into the even one before it."""

    places: ClassVar[frozenset[Place]] = LLM

    def needs(self) -> tuple[Need, ...]:
        return (Size(),)

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        return current - current // 2

    def reduce(self, tokens: VisualTokens) -> Reduction:
        seen.append((tokens[Size()], tokens.mask))
        number = torch.arange(tokens.mask.shape[1]).expand_as(tokens.mask)
        assign = torch.where(tokens.mask, number - number % 2, -1)
        return Reduction(tokens.mask & (number % 2 == 0), assign)


class Stubborn(Reducer):
    """Remove one token, whatever is asked."""

    places: ClassVar[frozenset[Place]] = LLM

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        return current - 1

    def reduce(self, tokens: VisualTokens) -> Reduction:
        return Reduction(tokens.mask & (torch.arange(tokens.mask.shape[1]) > 0))


class LargestNorm(Reducer):
    """Prune the patches of smallest norm; written as a Reduction without, or with, `assign`."""

    places: ClassVar[frozenset[Place]] = frozenset({"encoder"})
    says_where: bool = False
    reads_normed: bool = False

    def needs(self) -> tuple[Need, ...]:
        return (Features(), Normed() if self.reads_normed else Size())

    def reduce(self, tokens: VisualTokens) -> Reduction:
        order = tokens.features.norm(dim=-1).argsort(dim=1, descending=True, stable=True)
        keep = order.argsort(dim=1) < tokens.budget[:, None]
        seen.append(keep)
        itself = torch.arange(keep.shape[1]).expand_as(keep)
        return Reduction(keep, itself.where(keep, -1) if self.says_where else None)


class Watch(DecodeReducer):
    """See all visual entries, and note which ones they are."""

    def refresh(self, row: Tensor, previous: Tensor | None, kept: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(mask)
        return mask, row

    def reduce(self, tokens: VisualTokens) -> Reduction:
        raise NotImplementedError


RULES = {
    "above_average": AboveAverage,
    "two_rows": TwoRows,
    "pairs": Pairs,
    "stubborn": Stubborn,
    "largest_norm": LargestNorm,
    "watch": Watch,
}


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    """Register the reducers for a test."""
    seen.clear()
    for name, rule in RULES.items():
        register_reducer(name, rule)
    yield
    for name in RULES:
        unregister_reducer(name)


def recipe(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"method": "made_up", "steps": list(steps)}


# A rule that decides its own count


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_rule_that_decides_its_own_count_is_asked(family: str, layer: int) -> None:
    t = tiny.load(family)
    inputs, forced = t.batch().inputs, oracle.forced_tokens(3, 3)
    with oracle.capture(t.model, [layer]) as dense:
        oracle.run(t.model, inputs, forced[:, :0])
    step = {"reducer": "above_average", "at": {"layer": layer}}
    with squeeze.applied(t.model, recipe(step)) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
        (cut,), spans = handle.cuts, handle.layout.spans
    (tokens,) = seen
    assert tokens.counts == tuple(span.length for span in spans)
    for span in spans:
        norms = dense[layer][span.sample, list(span.columns)].norm(dim=-1)
        expected = torch.tensor(span.columns)[norms > norms.mean()]
        kept = cut.kept[span.sample]
        assert kept[torch.isin(kept, torch.tensor(span.columns))].tolist() == expected.tolist()
    masked = oracle.masked_logits(t.model, inputs, [cut], forced)
    oracle.assert_steps(squeezed, masked, inputs, [cut], "decided")


def test_a_budget_of_all_is_identity_for_such_a_rule_too() -> None:
    t = tiny.load("llava")
    step = {"reducer": "above_average", "at": "projector", "ratio": 0.0}
    with squeeze.applied(t.model, recipe(step)) as handle, torch.no_grad():
        t.model(**t.inputs["image"])
        assert not seen and not handle.cuts


@pytest.mark.parametrize("second", [{"reducer": "pairs"}, {"score": "random"}], ids=str)
def test_a_rule_may_leave_nothing_of_a_picture(second: dict[str, str]) -> None:
    """A later step has nothing to choose from there, and touches nobody else's tokens."""
    t = tiny.load("llava_next")
    inputs, forced = t.inputs["two_images"], oracle.forced_tokens(1, 3)
    with matrix.applied(t.model, "random") as handle, torch.no_grad():
        t.model(**inputs)
        few = min(span.length for span in handle.layout.spans)
    steps = [
        {"reducer": "above_average", "at": "projector", "none_of": few},
        {**second, "at": {"layer": 2}, "ratio": 0.5},
    ]
    with squeeze.applied(t.model, recipe(*steps)) as handle:
        with oracle.capture(t.model, [2]) as states:
            squeezed = oracle.run(t.model, inputs, forced)
        cuts, spans = handle.cuts, handle.layout.spans
    for span in spans:
        kept = len(set(cuts[-1].kept[0].tolist()) & set(span.columns))
        assert (kept == 0) == (span.length == few)
    words = (~t.visual(inputs))[0].nonzero().flatten()
    assert bool(torch.isin(words, cuts[-1].kept[0]).all())
    expected = oracle.masked_logits(t.model, inputs, cuts, forced, states if "reducer" in second else None)
    oracle.assert_steps(squeezed, expected, inputs, cuts, "nothing left")


# Signals


@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_two_signals_of_one_name(family: str) -> None:
    t = tiny.load(family)
    inputs = t.inputs["image"]
    width = inputs["input_ids"].shape[1]
    with matrix.attention(t.model, "eager"), torch.no_grad():
        where = oracle.positions(t.model, inputs, 0)[..., :width]
        out = t.model(**inputs, position_ids=where, output_attentions=True)
    attention = out.attentions[1].float().mean(1)[0]
    visual = t.visual(inputs)[0]
    words = ~visual & (visual.cumsum(0) > 0)
    expected = (attention[-1] - attention[words].mean(0))[visual]
    step = {"reducer": "two_rows", "at": {"layer": 2}, "ratio": 0.5}
    with squeeze.applied(t.model, recipe(step)) as handle:
        oracle.run(t.model, inputs, oracle.forced_tokens(1, 0))
        (score,) = seen
        assert len(handle.cuts) == 1
    oracle.assert_close(score[0], expected, "difference of two attentions")


def test_a_signal_that_nobody_asked_for_says_so() -> None:
    t = tiny.load("llava")
    step = {"reducer": "two_rows", "at": {"layer": 2}, "ratio": 0.5, "unasked": True}
    with (
        squeeze.applied(t.model, recipe(step)),
        pytest.raises(
            ConfigError,
            match=r"Attention\(block='next'\) was not asked for; there are: Attention\(\), Attention\(rows='text'\)",
        ),
    ):
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 0))


@pytest.mark.filterwarnings("ignore::mllm_squeeze.errors.SqueezeWarning")
@pytest.mark.parametrize("kind", ["image", "two_images"])
def test_size_counts_the_tokens_that_each_survivor_stands_for(kind: str) -> None:
    t = tiny.load("llava_next")
    steps = [
        {"reducer": "pairs", "at": {"layer": layer}, "ratio": ratio} for layer, ratio in ((0, 0.5), (1, 0.7), (2, 0.9))
    ]
    with squeeze.applied(t.model, recipe(*steps)) as handle:
        oracle.run(t.model, t.inputs[kind], oracle.forced_tokens(1, 0))
        lengths = [span.length for span in handle.layout.spans]
    for number, (size, mask) in enumerate(seen):
        for row, length in enumerate(lengths):
            mine, whole = size[row][mask[row]].tolist(), 2**number
            assert mine == [min(whole, length - start) for start in range(0, length, whole)]


@pytest.mark.filterwarnings("ignore::mllm_squeeze.errors.SqueezeWarning")
def test_size_behind_an_encoder_that_merged() -> None:
    t = tiny.load("llava_next")
    steps = [
        {"merge": "bipartite", "at": {"encoder": "all"}, "ratio": 0.4},
        {"reducer": "pairs", "at": {"layer": 2}, "ratio": 0.7},
    ]
    with squeeze.applied(t.model, recipe(*steps)) as handle:
        oracle.run(t.model, t.inputs["two_images"], oracle.forced_tokens(1, 0))
        lengths = [span.length for span in handle.layout.spans]
    ((size, mask),) = seen
    assert size.masked_fill(~mask, 0).sum(1).tolist() == lengths
    assert float(size.max()) > 1


# Inside the encoder


@pytest.mark.parametrize("says_where", [False, True])
@pytest.mark.parametrize("block", [1, "all"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "llava_next"])
def test_pruning_inside_the_encoder(family: str, block: int | str, says_where: bool) -> None:
    """The features that the LLM gets are those of an encoder whose pruned patches are closed; the others are cut."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    step = {"reducer": "largest_norm", "at": {"encoder": block}, "ratio": 0.5, "says_where": says_where}
    with squeeze.applied(t.model, recipe(step)) as handle:
        with oracle.capture(t.model, [0]) as short:
            squeezed = oracle.run(t.model, inputs, forced)
        (cut,), (span,) = handle.cuts, handle.layout.spans
    with pruned_closed(t, list(seen)), oracle.capture(t.model, [0]) as dense:
        expected = oracle.masked_logits(t.model, inputs, [cut], forced)
    oracle.assert_close(short[0][0], dense[0][0, cut.kept[0]], "features")
    oracle.assert_steps(squeezed, expected, inputs, [cut], "pruned in the encoder")
    cells = sum(tile.cells for tile in span.tiles)
    kept = len(set(cut.kept[0].tolist()) & set(span.columns)) - (span.length - cells)
    assert kept < cells
    if family == "llava":
        assert kept == int(seen[-1].sum())


@contextmanager
def pruned_closed(t: tiny.TinyModel, kept: list[Tensor]) -> Iterator[None]:
    """Close in the encoder, from each block on in front of which patches were pruned, what is gone by then."""
    tower = t.model.get_submodule(t.family.tower).encoder.layers
    first = 1
    alive: Tensor | None = None
    hooks = []
    for number, keep in enumerate(kept, first):
        alive = keep if alive is None else alive.masked_scatter(alive, keep)
        last = len(tower) if number == first + len(kept) - 1 else number + 1
        for block in tower[number:last]:
            hooks.append(block.register_forward_pre_hook(_closing(alive), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _closing(alive: Tensor) -> Any:
    def close(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        lead = hidden.shape[1] - alive.shape[1]
        seen_keys = torch.cat([torch.ones(len(alive), lead, dtype=torch.bool), alive], 1)
        mask = torch.where(seen_keys, 0.0, torch.finfo(hidden.dtype).min)[:, None, None]
        mask = mask.expand(-1, 1, hidden.shape[1], -1)
        return ((args[0], mask, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "attention_mask": mask})

    return close


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (
            {"reducer": "largest_norm", "reads_normed": True, "ratio": 0.5},
            r"reads Normed\(\) inside the vision encoder",
        ),
        ({"reducer": "above_average"}, "number of tokens inside the vision encoder"),
    ],
)
def test_what_cannot_work_inside_the_encoder(step: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AboveAverage, "places", frozenset({"encoder"}))
    made = recipe({"at": {"encoder": 1}, **step})
    with pytest.raises(UnsupportedModelError, match=says), squeeze.applied(tiny.load("llava").model, made):
        pass


# While decoding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kinds", [("video", "image_video", "text")])
def test_separators_are_no_visual_entries_while_decoding(kinds: tuple[str, ...], side: str) -> None:
    """They are attended to whatever a rule chooses: newlines between rows of a picture, and the one behind a video."""
    t = tiny.load("llava_onevision")
    batch, forced = t.batch(kinds, side), oracle.forced_tokens(len(kinds), 2)
    steps = [
        {"score": "random", "at": "projector", "ratio": 0.5, "separators": "keep"},
        {"reducer": "watch", "at": {"cache": "decode"}, "layer": 2},
    ]
    with squeeze.applied(t.model, recipe(*steps)) as handle:
        oracle.run(t.model, batch.inputs, forced)
        (cut,), spans = handle.cuts, handle.layout.spans
    cells: list[set[int]] = [set() for _ in kinds]
    separators = 0
    for span in spans:
        grid = [c for tile in span.tiles for c in tile.coordinates()]
        separators += sum(c[0] < 0 for c in grid)
        cells[span.sample] |= {column for column, c in zip(span.columns, grid, strict=True) if c[0] >= 0}
    assert separators
    width = max(len(kept) for kept in cut.kept)
    for mask in seen:
        for b, kept in enumerate(cut.kept):
            expected = [False] * (width - len(kept)) + [int(column) in cells[b] for column in kept]
            assert mask[b].tolist() == expected


# Less than asked


def test_a_rule_that_leaves_clearly_more_than_asked_says_so() -> None:
    t = tiny.load("llava")
    step = {"reducer": "stubborn", "at": "projector", "ratio": 0.5}
    with squeeze.applied(t.model, recipe(step)) as handle, torch.no_grad():
        with pytest.warns(SqueezeWarning, match="asked to leave 13 of the 25 tokens of a span, and leaves 24") as found:
            t.model(**t.inputs["image"])
        assert len(found) == 1
        with pytest.warns(SqueezeWarning) as found:
            t.model(**t.inputs["two_images"])
        assert len(found) == 1 and len(handle.cuts) == 1


def test_dycoke_on_two_frames_says_so() -> None:
    t = tiny.load("llava_onevision")
    inputs = dict(t.inputs["video"])
    visual = t.visual(inputs)[0]
    frames = inputs["pixel_values_videos"].shape[1]
    tokens = (int(visual.sum()) - 1) // frames
    # Placeholders of the frames that go.
    gone = visual.nonzero().flatten()[: (frames - 2) * tokens]
    left = torch.ones_like(visual).index_fill(0, gone, False)
    inputs |= {k: inputs[k][:, left] for k in ("input_ids", "attention_mask")}
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :2]
    with (
        matrix.applied(t.model, "dycoke", ratio=0.75),
        torch.no_grad(),
        pytest.warns(
            SqueezeWarning,
            match=f"asked to leave {tokens // 2} of the {2 * tokens} tokens.*leaves {tokens}: the first frame",
        ),
    ):
        t.model(**inputs)


@pytest.mark.parametrize("method", ["vidcom2", "avgpool"])
def test_a_token_of_each_frame_above_the_budget_is_said(method: str) -> None:
    t = tiny.load("llava_onevision")
    says = "asked to leave 2 of the .* and leaves 8: each (frame|group)"
    with matrix.applied(t.model, method, keep=2), torch.no_grad(), pytest.warns(SqueezeWarning, match=says):
        t.model(**t.inputs["video"])


def test_rounding_is_no_reason_to_warn() -> None:
    t = tiny.load("llava_onevision")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", SqueezeWarning)
        for method in ("dycoke", "vidcom2", "dart", "avgpool", "sparsevlm"):
            with matrix.applied(t.model, method, **({"ratio": 0.3} if method == "dycoke" else {})):
                t.model(**t.inputs["video"])
