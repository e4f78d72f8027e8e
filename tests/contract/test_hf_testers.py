"""Inputs as transformers' own model testers make them: random masks, several pictures, each form of a call and answer.

At ratio 0 nothing that comes back differs by a bit; at ratio 0.5 survivors and decode steps equal the masked model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

import cache_role
import matrix
import oracle
import tiny
from tiny.parts import AFTER
from tiny.prompts import collate, sample

FAMILIES = ("llava", "qwen2_5_vl", "internvl", "llava_onevision")
METHODS = matrix.EVERYWHERE
STEPS = 3


@dataclass(frozen=True)
class Form:
    """How a tester calls the model: its keyword arguments, and what it does with ids, cache and attention."""

    settings: dict[str, Any] = field(default_factory=dict)
    implementation: str = "sdpa"
    embeds: bool = False
    labels: bool = False
    gives_cache: bool = False


FORMS = {
    "plain": Form(),
    "cache": Form({"use_cache": True}),
    "no cache": Form({"use_cache": False}),
    "cache given": Form(gives_cache=True),
    "cache given, unused": Form({"use_cache": False}, gives_cache=True),
    "attentions": Form({"output_attentions": True}, "eager"),
    "hidden states": Form({"output_hidden_states": True}),
    "tuple": Form({"return_dict": False}),
    "tuple of all": Form({"return_dict": False, "output_attentions": True, "output_hidden_states": True}, "eager"),
    "labels": Form(labels=True),
    "labels, tuple": Form({"return_dict": False, "use_cache": False}, labels=True),
    "embeds": Form(embeds=True),
    "last logits": Form({"logits_to_keep": 3}),
}
DECODED = ("plain", "cache given", "embeds")
# Each way of a call once; the other forms differ in what comes back only.
PROVED = ("plain", "no cache", "cache given", "cache given, unused", "tuple of all", "labels", "embeds", "last logits")


def cells(forms: Iterable[str] = FORMS) -> list[Any]:
    """Return (family, form); a small part is quick."""
    out = []
    for family in FAMILIES:
        for form in forms:
            quick = family == "llava" and form in ("plain", "tuple of all", "cache given")
            out.append(pytest.param(family, form, marks=[pytest.mark.quick] if quick else []))
    return out


def made(t: tiny.TinyModel, seed: int) -> tiny.Inputs:
    """Return two rows of random words with two and three pictures, of which a random mask hides every other token."""
    draw = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(40, 95, (n,), generator=draw).tolist()

    rows = [("image:0", *words(2), "image:1"), (*words(3), "image:1", "image:2", *words(1), "image:0")]
    lengths = [len(sample(t.family, *row).ids) for row in rows]
    tails = [(*AFTER, *words(max(lengths) - length)) for length in lengths]
    prompts = [sample(t.family, *row, tail=tail) for row, tail in zip(rows, tails, strict=True)]
    inputs = collate(t.family, prompts)
    assert bool(inputs["attention_mask"].all()), "testers do not pad"
    if hasattr(t.model.model, "get_rope_index"):
        # Half a picture has no place in a grid, so the positions are those of the prompt without holes.
        inputs["position_ids"] = oracle.positions(t.model, inputs, 0)
    mask = torch.randint(0, 2, inputs["input_ids"].shape, generator=draw)
    mask[:, -1] = 1
    return {**inputs, "attention_mask": mask}


@torch.no_grad()
def call(t: tiny.TinyModel, inputs: tiny.Inputs, form: Form, labels: Tensor | None = None) -> Any:
    """Return what the model answers to these inputs, given in this form."""
    given: dict[str, Any] = dict(inputs) | form.settings
    if form.embeds:
        given["inputs_embeds"] = t.model.get_input_embeddings()(given.pop("input_ids"))
    if form.labels:
        given["labels"] = inputs["input_ids"] if labels is None else labels
    if form.gives_cache:
        given |= cache_role.given(DynamicCache(config=t.model.config))
    return t.model(**given)


@torch.no_grad()
def decode(t: tiny.TinyModel, inputs: tiny.Inputs, out: Any) -> Tensor:
    """Feed forced tokens behind an output; returns their logits (B, STEPS, V)."""
    mask, logits = inputs["attention_mask"], []
    forced = oracle.forced_tokens(len(mask), STEPS)
    for n in range(STEPS):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        given: dict[str, Any] = {"input_ids": forced[:, n : n + 1], "attention_mask": mask}
        if "position_ids" in inputs:
            given["position_ids"] = inputs["position_ids"][..., -1:] + n + 1
        out = t.model(**given, **cache_role.behind(out), use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def leaves(value: Any, where: str = "") -> dict[str, Tensor]:
    """Return all tensors of an output by where they stand, those of its cache too."""
    if isinstance(value, Tensor):
        return {where: value}
    parts: Any = ()
    if isinstance(value, Cache):
        parts = [(f"{n}.{name}", getattr(x, name)) for n, x in enumerate(value.layers) for name in ("keys", "values")]
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (tuple, list)):
        parts = enumerate(value)
    return {k: v for key, part in parts for k, v in leaves(part, f"{where}/{key}").items()}


@pytest.mark.parametrize(("family", "form"), cells())
def test_ratio_zero_gives_the_same_output(family: str, form: str) -> None:
    """Every tensor of the output, and its names and order."""
    t, how = tiny.load(family), FORMS[form]
    inputs = made(t, 1)
    with matrix.attention(t.model, how.implementation):
        dense = call(t, inputs, how)
        expected = leaves(dense)
        later = decode(t, inputs, dense) if form in DECODED else None
        for method in METHODS:
            with matrix.applied(t.model, method, ratio=0):
                out = call(t, inputs, how)
                found = leaves(out)
                if later is not None:
                    assert torch.equal(decode(t, inputs, out), later), f"{method}: decode"
            assert type(out) is type(dense)
            assert list(found) == list(expected), f"{method}: other parts"
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), f"{method}: {name}"


def last_logits(out: Any, form: Form) -> Tensor:
    """Return the logits of an output, which a tuple holds first, or behind the loss."""
    logits: Tensor = out[int(form.labels)] if isinstance(out, tuple) else out.logits
    return logits


@pytest.mark.parametrize(("family", "form"), cells(PROVED))
def test_a_cut_answers_as_the_masked_model(family: str, form: str) -> None:
    t, how = tiny.load(family), FORMS[form]
    for seed, method in enumerate(METHODS):
        inputs = made(t, seed)
        with matrix.attention(t.model, how.implementation):
            prove(t, inputs, method, how, form in DECODED)


def with_holes(cut: Any, mask: Tensor) -> oracle.Drop:
    """Return the cut with the masked columns beside what it keeps: closed all the same, they hold places in a row.

    A forward without position_ids counts columns, masked or not, and survivors are renumbered by what was cut alone.
    """
    holes = [(row == 0).nonzero().flatten() for row in mask]
    return oracle.Drop(cut.layer, [torch.cat(both).unique() for both in zip(cut.kept, holes, strict=True)])


def at_columns(states: Tensor, cut: Any, placed: oracle.Drop) -> Tensor:
    """Return the states (B, M, D) behind a cut, padded in front, in the order of `placed`: zeros where a hole is."""
    out = states.new_zeros(len(states), max(len(columns) for columns in placed.kept), states.shape[-1])
    for b, (kept, columns) in enumerate(zip(cut.kept, placed.kept, strict=True)):
        out[b, torch.searchsorted(columns, kept)] = states[b, -len(kept) :]
    return out


def prove(t: tiny.TinyModel, inputs: tiny.Inputs, method: str, how: Form, decodes: bool) -> None:
    """Compare the logits of survivors, the loss and the decode steps with those of the masked dense model."""
    width, labels = inputs["input_ids"].shape[1], None
    with matrix.applied(t.model, method) as handle:
        if how.labels:
            call(t, inputs, Form())
            alive = oracle.survivors(inputs, handle.cuts)
            # What is foretold at a column that was cut is foretold by no state of the masked model.
            labels = inputs["input_ids"].masked_fill(~nn.functional.pad(alive[:, :-1], (1, 0)), -100)
        with oracle.capture(t.model, range(4)) as states:
            out = call(t, inputs, how, labels)
        later = decode(t, inputs, out) if decodes else None
        cuts, repack = handle.cuts, matrix.repacks(handle)
    assert cuts, f"{method}: nothing was cut"
    placed = [with_holes(cut, inputs["attention_mask"]) for cut in cuts]
    merges = matrix.method(method).merges
    merged = {c.layer: at_columns(states[c.layer], c, p) for c, p in zip(cuts, placed, strict=True)} if merges else None
    with oracle.masked(t.model, width, placed, merged, repack):
        expected = call(t, inputs, how, labels)
        if later is not None:
            oracle.assert_close(later, decode(t, inputs, expected), f"{method} decode")
    mine, theirs = last_logits(out, how), last_logits(expected, how)
    alive = oracle.survivors(inputs, cuts)[:, -mine.shape[1] :]
    oracle.assert_close(mine[alive], theirs[alive], method)
    if how.labels:
        oracle.assert_close(out[0], expected[0], f"{method} loss")
