"""Several turns on one cache: the second turn sees what the first one kept, and may bring a new picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import cache_role
import matrix
import oracle
import tiny

NEW = 5
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
CELLS = [(f, m) for f in matrix.FAMILIES for m in matrix.EVERYWHERE]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_second_turn_of_text(family: str, method: str, implementation: str) -> None:
    """generate() on the returned cache answers as the dense masked model does for the whole conversation."""
    t = tiny.load(family)
    inputs = t.inputs["image"]
    with matrix.attention(t.model, implementation):
        with matrix.applied(t.model, method) as handle:
            with oracle.capture(t.model, range(4)) as states:
                first = t.model.generate(**inputs, **SETTINGS)
            cuts, repack = handle.cuts, matrix.repacks(handle)
            answer = first.sequences[:, inputs["input_ids"].shape[1] :]
            turn = t.turn(inputs, answer, 50, 51, 52, 53, 54)
            text = {k: turn.whole[k] for k in TEXT if k in turn.whole}
            forced = oracle.forced_tokens(1, NEW)
            second = oracle.generate(t.model, text, forced, **cache_role.behind(first))
        merged = matrix.merged(method, cuts, states)
        with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts, merged, repack):
            # The dense model reads the answer as it was generated, token by token, then the new turn.
            expected = read_on(t, inputs, answer, turn.new["input_ids"], forced)
    oracle.assert_close(second, expected, "second turn")


@torch.no_grad()
def read_on(t: tiny.TinyModel, inputs: tiny.Inputs, answer: Tensor, new: Tensor, forced: Tensor) -> Tensor:
    """Return the logits (1, n + 1, V) behind prompt, answer and new turn, on one cache."""
    width, more = inputs["input_ids"].shape[1], torch.cat([answer, new, forced], 1)
    where = oracle.positions(t.model, inputs, more.shape[1])
    out = t.model(**inputs, position_ids=where[..., :width], use_cache=True)
    logits = []
    for n in range(more.shape[1]):
        at = where[..., width + n : width + n + 1]
        out = t.model(input_ids=more[:, n : n + 1], position_ids=at, **cache_role.behind(out))
        logits.append(out.logits[:, -1])
    return torch.stack(logits[-forced.shape[1] - 1 :], 1)


def two_turns(
    t: tiny.TinyModel, handle: Any, forced: Tensor, cache: Any = None
) -> tuple[list[Tensor], list[Any], list[Any], tiny.Turn]:
    """Prefill a picture, answer it, feed a second one on the same cache, decode; return logits and both cuts."""
    inputs, answer = t.inputs["image"], oracle.forced_tokens(1, 3, seed=1)
    turn = t.turn(inputs, answer, 50, 51, "image:1", 52, 53, 54, 55, 56)
    width = inputs["input_ids"].shape[1]
    seen, whole = width + answer.shape[1], turn.whole["input_ids"].shape[1]
    where = oracle.positions(t.model, turn.whole, forced.shape[1])
    with torch.no_grad():
        out = t.model(**inputs, position_ids=where[..., :width], **cache_role.given(cache), use_cache=True)
        first = list(handle.cuts) if handle else []
        for n in range(answer.shape[1]):
            at = where[..., width + n : width + n + 1]
            out = t.model(input_ids=answer[:, n : n + 1], position_ids=at, **cache_role.behind(out))
        new = {k: v for k, v in turn.new.items() if k != "attention_mask"}
        out = t.model(**new, position_ids=where[..., seen:whole], **cache_role.behind(out))
        second = list(handle.cuts) if handle else []
        logits = [out.logits[:, -1]]
        for n in range(forced.shape[1]):
            at = where[..., whole + n : whole + n + 1]
            out = t.model(input_ids=forced[:, n : n + 1], position_ids=at, **cache_role.behind(out))
            logits.append(out.logits[:, -1])
    return logits, first, second, turn


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [matrix.KEEPS_POSITIONS, *matrix.CORE, "dart"])
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_two_turns_on_a_static_cache(family: str, method: str, implementation: str) -> None:
    """Slots that the second cut sets free stay where they are; both turns answer as with a growing cache."""
    t = tiny.load(family)
    forced = oracle.forced_tokens(1, NEW)
    cache = transformers.StaticCache(config=t.model.config.get_text_config(), max_cache_len=192)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method) as handle:
        expected, *_ = two_turns(t, handle, forced)
        got, *_ = two_turns(t, handle, forced, cache)
    oracle.assert_close(torch.stack(got), torch.stack(expected), "second turn")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["random", "fastv", "dart"])
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_second_turn_with_a_new_picture(family: str, method: str, implementation: str) -> None:
    """Both pictures are cut, each in its own turn; the dense model with both sets of columns closed says the same."""
    t = tiny.load(family)
    forced = oracle.forced_tokens(1, NEW)
    with matrix.attention(t.model, implementation):
        with matrix.applied(t.model, method) as handle:
            logits, first, second, turn = two_turns(t, handle, forced)
        seen = turn.whole["input_ids"].shape[1] - turn.new["input_ids"].shape[1]
        cuts = joined(first, second, seen, turn.whole["input_ids"].shape[1])
        visual = t.visual(turn.whole)[0]
        assert int(visual[cuts[-1].kept[0]].sum()) < int(visual.sum())
        assert not visual[seen:].all()
        assert len(second[-1].kept[0]) < turn.new["input_ids"].shape[1], "the second picture was not cut"
        # The first picture's columns close at once here; they were closed before the second one came there, too.
        expected = oracle.masked_logits(t.model, turn.whole, cuts, forced)
    oracle.assert_close(logits[0], expected.prefill[:, -1], "prefill of the second turn")
    oracle.assert_close(torch.stack(logits[1:], 1), expected.decode, "decode")


def joined(first: list[Any], second: list[Any], seen: int, whole: int) -> list[oracle.Drop]:
    """Return cuts of the whole conversation; columns of the second turn start at `seen`."""
    cuts = []
    for one, two in zip(first, second, strict=True):
        assert one.layer == two.layer
        between = torch.arange(len_of(first), seen)
        cuts.append(oracle.Drop(one.layer, [torch.cat([one.kept[0], between, two.kept[0] + seen])]))
    assert whole > seen
    return cuts


def len_of(cuts: list[Any]) -> int:
    """Return the length of the first prompt: its last text column is always kept."""
    return int(cuts[0].kept[0][-1]) + 1


@pytest.mark.parametrize("family", [f for f in matrix.FAMILIES if "qwen" not in f])
@pytest.mark.parametrize("method", ["random", "fastv", "divprune"])
def test_a_second_picture_through_generate(family: str, method: str) -> None:
    """generate() with the whole conversation, the new picture and the cache (M-RoPE models cannot, even dense)."""
    t = tiny.load(family)
    forced = oracle.forced_tokens(1, NEW)
    inputs = t.inputs["image"]
    with matrix.applied(t.model, method) as handle:
        by_hand = two_turns(t, handle, forced)[0]
        answer = oracle.forced_tokens(1, 3, seed=1)
        turn = t.turn(inputs, answer, 50, 51, "image:1", 52, 53, 54, 55, 56)
        processor = oracle.force(answer, inputs["input_ids"].shape[1])
        # One more token than the answer is chosen but not fed, so the cache ends with the answer.
        settings = SETTINGS | {"max_new_tokens": answer.shape[1] + 1}
        first = t.model.generate(**inputs, **settings, logits_processor=processor)
        text = {k: turn.whole[k] for k in TEXT if k in turn.whole}
        arrays = {k: v for k, v in turn.new.items() if k not in TEXT}
        second = oracle.generate(t.model, {**text, **arrays}, forced, **cache_role.behind(first))
    oracle.assert_close(second, torch.stack(by_hand, 1), "generate against a loop by hand")
