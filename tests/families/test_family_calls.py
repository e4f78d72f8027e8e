"""Every family: padded batches, beams, a second turn, decoding on fewer entries, and removal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import cache_role
import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from families import proof
from unit.test_tiny_families import groups

NEW = 4
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def batches() -> list[Any]:
    """Return (family, kinds) of each group of prompts that one batch may hold."""
    out = []
    for family in proof.SERVED:
        for kinds in groups(family, tiny.kinds(family)):
            out.append(pytest.param(family, kinds, id=f"{family}-{kinds[0]}", marks=proof.marks(family)))
    return out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "kinds", "method"), proof.in_turn(batches()))
def test_a_row_of_a_left_padded_batch_is_the_prompt_alone(
    family: str, kinds: tuple[str, ...], method: str, covers: Any
) -> None:
    """Rows with other sizes, lengths and numbers of pieces: the same tokens stay, and the same is said."""
    covers(family, "batch")
    t = tiny.load(family)
    batch, forced = t.batch(kinds), oracle.forced_tokens(len(kinds), 2)
    with squeeze.applied(t.model, method, **proof.params(family, method)) as handle:
        joint = proof.generate(t, batch.inputs, forced)
        cuts = handle.cuts
        for b, single in enumerate(batch.singles):
            alone = proof.generate(t, single, forced[b : b + 1])
            if kinds[b] != "text":
                kept = [(c.kept[b] - batch.offsets[b]).tolist() for c in cuts]
                assert kept == [c.kept[0].tolist() for c in handle.cuts], f"row {b}"
            oracle.assert_close(joint[b : b + 1], alone, f"row {b}")


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("family", proof.families())
def test_generate_equals_masked_recomputation(family: str, positions: str) -> None:
    """Greedy answers, free of what either run says, after cuts before and inside the LLM, in both numberings."""
    t = tiny.load(family)
    places = (("projector", 0.4), ({"layer": 2}, 0.7))
    steps = [{"select": "even_sample", "at": at, "ratio": ratio} for at, ratio in places]
    inputs = {k: v.clone() for k, v in t.inputs[tiny.kinds(family)[0]].items()}
    settings = SETTINGS | {"max_new_tokens": 6}
    with squeeze.applied(t.model, {"method": "mine", "positions": positions, "steps": steps}) as handle:
        mine = t.model.generate(**inputs, **settings)
        # Positions of three axes are always kept.
        cuts, repack = handle.cuts, proof.repacks(handle)
    assert [c.layer for c in cuts] == [0, 2]
    said = mine.sequences[:, -6:]
    if oracle.recurrent(t.model):
        expected = oracle.dropped_logits(t.model, proof.followed(t, inputs, said[:, :-1]), cuts, repack)[:, -6:]
    else:
        with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts, repack=repack):
            dense = t.model.generate(**inputs, **settings)
        assert torch.equal(said, dense.sequences[:, -6:])
        expected = torch.stack(dense.logits, 1)
    oracle.assert_close(torch.stack(mine.logits, 1), expected, positions)


def beams() -> list[Any]:
    """Return (family, kind): the first and the last thing that a family can be shown."""
    out = []
    for family in proof.SERVED:
        for kind in dict.fromkeys((proof.shown(family)[0], proof.shown(family)[-1])):
            out.append(pytest.param(family, kind, id=f"{family}-{kind}", marks=proof.marks(family)))
    return out


def deals_beams(t: tiny.TinyModel, kind: str) -> bool:
    """Say whether the dense model shows each beam of a prompt what the prompt shows."""
    inputs = {k: v.clone() for k, v in t.inputs[kind].items()}
    try:
        first = t.model.generate(**inputs, **SETTINGS, num_beams=3).logits[0]
    except ValueError:
        return False
    return oracle.gap(first, first[:1].expand_as(first)) < oracle.TOLERANCE


@pytest.mark.parametrize(("family", "kind", "method"), proof.in_turn(beams()))
def test_beams(family: str, kind: str, method: str, covers: Any) -> None:
    """Beams of the dense model with the dropped columns closed, or where no mask does that, one beam is greedy."""
    t = tiny.load(family)
    right = deals_beams(t, kind)
    if proof.RECENT:
        assert right == ((family, kind) not in proof.BEAMS_BROKEN), "the library has changed: mend proof.BEAMS_BROKEN"
    if not right:
        covers(family, "beams", refused=f"transformers itself cannot repeat {kind.replace('_', ' ')} for beams.")
        return
    with proof.whole(t, kind, method) as (handle, inputs):
        several = t.model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2)
        assert several.sequences.shape[0] == 2
        cuts, repack = handle.cuts, proof.repacks(handle)
        greedy = t.model.generate(**inputs, **SETTINGS)
        alone = t.model.generate(**inputs, **SETTINGS, num_beams=1)
        assert torch.equal(greedy.sequences, alone.sequences)
    for cut in cuts:
        assert all(kept.tolist() == cut.kept[0].tolist() for kept in cut.kept), "beams keep different tokens"
    if oracle.recurrent(t.model):
        return
    single = [oracle.Drop(c.layer, c.kept[:1]) for c in cuts]
    with oracle.masked(t.model, inputs["input_ids"].shape[1], single, repack=repack):
        expected = t.model.generate(**inputs, **SETTINGS, num_beams=3, num_return_sequences=2)
    assert torch.equal(several.sequences, expected.sequences)
    oracle.assert_close(torch.stack(several.logits, 1), torch.stack(expected.logits, 1), "logits of all beams")


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", proof.families([f for f in proof.SERVED if f not in proof.OWN_GENERATE]))
def test_a_second_turn_on_the_same_cache(family: str, method: str, covers: Any) -> None:
    """generate() on the cache of the first turn says what one prompt with the whole conversation says."""
    covers(family, "turns")
    t = tiny.load(family)
    answer, forced = oracle.forced_tokens(1, 3, seed=1), oracle.forced_tokens(1, 2)
    settings = SETTINGS | {"max_new_tokens": answer.shape[1] + 1}
    if not proof.RECENT and family == "gemma3_window":
        pytest.skip(f"transformers {transformers.__version__} itself cannot go on behind a full sliding window")
    with proof.whole(t, proof.first_kind(family, method), method) as (handle, inputs):
        choose = oracle.forcing(t.model, answer, inputs["input_ids"].shape[1])
        turn = t.turn(inputs, answer, 50, 51, 52, 53).whole
        text = {k: v for k, v in turn.items() if k in TEXT}
        first = t.model.generate(**inputs, **settings, **choose)
        cuts, repack = handle.cuts, proof.repacks(handle)
        second = proof.generate(t, text, forced, **cache_role.behind(first))
    if family in proof.PREFIX:
        with oracle.masked(t.model, inputs["input_ids"].shape[1], cuts, repack=repack):
            first = t.model.generate(**inputs, **settings, **choose)
            expected = proof.generate(t, text, forced, **cache_role.behind(first))
    else:
        expected = one_shot(t, proof.followed(t, turn, forced), cuts, repack)[:, -forced.shape[1] - 1 :]
    oracle.assert_close(second, expected, "second turn")


def one_shot(t: tiny.TinyModel, inputs: tiny.Inputs, cuts: Any, repack: bool) -> torch.Tensor:
    """Return the logits (1, T', V) of a whole conversation of which the first prompt was cut."""
    if oracle.recurrent(t.model):
        return oracle.dropped_logits(t.model, inputs, cuts, repack)
    prompt = int(cuts[0].kept[0][-1]) + 1
    with oracle.masked(t.model, prompt, cuts, repack=repack):
        return proof.forward(t, inputs)


@pytest.mark.parametrize("family", proof.families([f for f in proof.SERVED if f not in proof.OWN_GENERATE]))
def test_fewer_entries_while_decoding(family: str, covers: Any) -> None:
    """What a step chose not to see is what masks close that are put over the same cut without the choice."""
    covers(family, "cache")
    t = tiny.load(family)
    text = oracle.text_model(t.model)
    layers = range(2, len(text.layers))
    layer = next(n for n in layers if n - 1 not in oracle.recurrent(t.model))
    cut = {"select": "even_sample", "at": "projector", "ratio": 0.25}
    choose = {"reducer": "decode_refresh", "at": {"cache": "decode"}, "layer": layer, "drop": 0.5, "threshold": 0.9}
    forced = oracle.forced_tokens(1, 3)
    with squeeze.applied(t.model, {"method": "decode", "steps": [cut, choose]}) as handle:
        chosen = list(decode(t, forced))
        visual = cells(handle.layout)[handle.cuts[0].kept[0]]
    with squeeze.applied(t.model, {"method": "cut", "steps": [cut]}):
        cache: Any = None
        for n, (logits, kept) in enumerate(chosen):
            open_ = kept | ~visual
            assert 0 < int((~open_).sum()) < int(visual.sum())
            hooks = []
            if n == 0:
                cache = prefill(t)
            for number in layers:
                if number >= layer and number not in oracle.recurrent(t.model):
                    hooks.append(text.layers[number].register_forward_pre_hook(closing(open_, n), with_kwargs=True))
            try:
                with torch.no_grad():
                    expected = t.model(input_ids=forced[:, n : n + 1], **cache_role.given(cache)).logits
            finally:
                for hook in hooks:
                    hook.remove()
            oracle.assert_close(logits, expected, f"step {n}")


def cells(layout: Any) -> torch.Tensor:
    """Return bool (T,), True for the pieces of the picture of a prompt; separators are never left out of sight."""
    found = layout.visual[0].clone()
    for span in layout.spans:
        columns = [int(column) for column in span.columns]
        for tile in span.tiles:
            mine, columns = columns[: tile.length], columns[tile.length :]
            for column, cell in zip(mine, tile.coordinates(), strict=True):
                found[column] = min(cell) >= 0
    return found


def prefill(t: tiny.TinyModel) -> Any:
    """Return the cache behind the first prompt of a family."""
    cache = transformers.DynamicCache(config=t.model.config)
    proof.forward(t, t.inputs[tiny.kinds(t.name)[0]], **cache_role.given(cache), use_cache=True)
    return cache


def decode(t: tiny.TinyModel, forced: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Feed the tokens one by one; yields logits, and which held entries of the prompt the step chose to see."""
    cache = prefill(t)
    for n in range(forced.shape[1]):
        with torch.no_grad():
            logits = t.model(input_ids=forced[:, n : n + 1], **cache_role.given(cache)).logits
        notes = [layer.notes for layer in cache.layers if getattr(layer, "notes", None)]
        assert len(notes) == 1, "no layer chose"
        yield logits, notes[0]["kept"][0]


def closing(open_: torch.Tensor, step: int) -> Any:
    """Return a hook that closes entries (bool (P,)) of the prompt for a decode step of one token."""

    def close(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        seen = torch.cat([open_, open_.new_ones(step + 1)])[None, None, None]
        if mask is None or mask.dtype == torch.bool:
            mask = seen if mask is None else mask & seen[..., -mask.shape[-1] :]
        else:
            mask = mask.masked_fill(~seen[..., -mask.shape[-1] :], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return close


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *proof.in_turn(proof.families(), (*matrix.CORE[:2], matrix.MERGED_BEFORE)),
        *proof.in_turn(proof.families(), ("tome",)),
    ],
)
def test_everything_is_put_back(family: str, method: str) -> None:
    t = tiny.load(family)
    if proof.misfit(family, method):
        before = snapshot.snapshot(t.model)
        with pytest.raises(squeeze.SqueezeError):
            squeeze.apply(t.model, method)
        snapshot.assert_same(before, snapshot.snapshot(t.model))
        return
    inputs, forced = t.inputs[proof.first_kind(family, method)], oracle.forced_tokens(1, 1)
    dense, steps = proof.forward(t, inputs), proof.generate(t, inputs, forced)
    before = snapshot.snapshot(t.model)
    with squeeze.applied(t.model, method, **proof.params(family, method)):
        proof.forward(t, inputs)
        proof.generate(t, inputs, forced)
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert torch.equal(proof.forward(t, inputs), dense)
    assert torch.equal(proof.generate(t, inputs, forced), steps)


def test_every_column_of_the_page_has_its_method() -> None:
    """The columns are those of docs/families.md, however many methods there are."""
    assert set(proof.PLACES.values()) == {"projector", "scores", "layer", "layers", "encoder", "video", "audio"}
    assert any(matrix.method(name).decodes for name in proof.PLACES)
