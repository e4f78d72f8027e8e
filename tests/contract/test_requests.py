"""Budgets per request: each equals the method applied with it; threads, tasks and rows do not meet; the switch."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from mllm_squeeze.errors import ConfigError, InUseError, NotAppliedError, SqueezeError, UnsupportedInputError
from mllm_squeeze.recipe.recipe import load_recipe, with_budget
from mllm_squeeze.registry import method_names

pytestmark = pytest.mark.quick
# At the projector, at a layer, at several, while choosing rows, inside the encoder.
METHODS = ("divprune", "fastv", "pyramiddrop", "sparsevlm", "tome", "visionzip")


def answered(t: tiny.TinyModel, rows: int = 1) -> oracle.Steps:
    return oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(rows, 3))


def same(one: oracle.Steps, other: oracle.Steps) -> bool:
    return torch.equal(one.prefill, other.prefill) and torch.equal(one.decode, other.decode)


@pytest.mark.parametrize("asked", [{"ratio": 0.75}, {"keep": 5}, {"total": 9}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_request_is_the_method_applied_so(method: str, asked: dict[str, Any]) -> None:
    t = tiny.load("llava")
    try:
        with squeeze.applied(t.model, method, **asked) as alone:
            expected, cuts = answered(t), alone.cuts
    except ConfigError:
        with squeeze.applied(t.model, method) as handle:
            before = snapshot.snapshot(t.model)
            with pytest.raises(ConfigError):
                handle.using(**asked)
            snapshot.assert_same(before, snapshot.snapshot(t.model))
        return
    # One block of an encoder merges at most half, so less is asked of it outside.
    with squeeze.applied(t.model, method, ratio=0.25) as handle:
        before, outside = snapshot.snapshot(t.model), answered(t)
        with handle.using(**asked) as call:
            snapshot.assert_same(before, snapshot.snapshot(t.model))
            assert same(answered(t), expected)
        assert not same(outside, expected)
        for one, other in zip(call.cuts, cuts, strict=True):
            assert torch.equal(one.index, other.index)
        assert same(answered(t), outside)
        assert str(call.report()) != str(handle.report())


@pytest.mark.parametrize("method", method_names())
def test_a_recipe_with_another_budget_is_loaded_so(method: str) -> None:
    for first, then in (({"keep": 7}, {"ratio": 0.8}), ({"ratio": 0.3}, {"total": 50}), ({}, {"keep": 0.5})):
        try:
            recipe, expected = load_recipe(method, **first), load_recipe(method, **then)
        except SqueezeError:
            continue
        assert with_budget(recipe, *next(iter(then.items()))) == expected


def test_rows_of_a_batch() -> None:
    t = tiny.load("llava")
    batch, rows = matrix.even_batch(t)
    asked = [0.25, 0.9, 0.5][: len(rows)] + [0.5] * (len(rows) - 3)
    forced = oracle.forced_tokens(len(rows), 3)
    with squeeze.applied(t.model, "fastv", ratio=0.5) as handle:
        with handle.using(ratio=asked):
            together = oracle.run(t.model, batch, forced)
        for number, (row, ratio) in enumerate(zip(rows, asked, strict=True)):
            with handle.using(ratio=ratio):
                alone = oracle.run(t.model, row, forced[number : number + 1])
            oracle.assert_close(together.decode[number], alone.decode[0], f"row {number}")
        with handle.using(ratio=[0.5] * (len(rows) + 1)), pytest.raises(ConfigError, match="one number for each row"):
            oracle.run(t.model, batch, forced)


def test_threads_and_tasks_do_not_meet() -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 4)
    ratios = (0.25, 0.5, 0.9)
    with squeeze.applied(t.model, "fastv", ratio=0.7) as handle:
        expected: dict[float, Tensor] = {}
        for ratio in ratios:
            with handle.using(ratio=ratio):
                expected[ratio] = oracle.generate(t.model, inputs, forced)
        assert not torch.equal(expected[0.25], expected[0.9])
        found: list[tuple[float, Tensor, float]] = []
        gate = threading.Barrier(len(ratios))

        def work(ratio: float) -> None:
            with handle.using(ratio=ratio) as call:
                gate.wait(60)
                for _ in range(3):
                    answer = oracle.generate(t.model, inputs, forced)
                    found.append((ratio, answer, len(call.cuts[0].kept[0])))

        threads = [threading.Thread(target=work, args=(ratio,)) for ratio in ratios]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(found) == 3 * len(ratios)
        kept = {ratio: {count for other, _, count in found if other == ratio} for ratio in ratios}
        assert all(torch.equal(answer, expected[ratio]) for ratio, answer, _ in found)
        assert all(len(counts) == 1 for counts in kept.values())
        assert len({next(iter(counts)) for counts in kept.values()}) == len(ratios)

        async def task(ratio: float) -> bool:
            with handle.using(ratio=ratio):
                await asyncio.sleep(0)
                first = oracle.generate(t.model, inputs, forced)
                await asyncio.sleep(0)
                return torch.equal(first, expected[ratio])

        async def all_tasks() -> list[bool]:
            return await asyncio.gather(*map(task, ratios))

        assert asyncio.run(all_tasks()) == [True] * len(ratios)


@pytest.mark.parametrize(
    "asked",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": "half"},
        {"keep": 0},
        {"keep": 1.5},
        {"total": 0.5},
        {"ratio": []},
        {"ratio": 0.5, "keep": 4},
        {"ratio": 0.5, "off": True},
        {"off": 1},
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(asked: dict[str, Any]) -> None:
    t = tiny.load("llava")
    with squeeze.applied(t.model, "fastv", ratio=0.5) as handle:
        before = snapshot.snapshot(t.model)
        with pytest.raises(ConfigError):
            handle.using(**asked)
        snapshot.assert_same(before, snapshot.snapshot(t.model))
    with pytest.raises(NotAppliedError):
        handle.using(ratio=0.5)


def test_keep_1_and_keep_all_are_told_apart() -> None:
    t = tiny.load("llava")
    with squeeze.applied(t.model, "fastv", ratio=0.5) as handle:
        kept = []
        for keep in (1, 1.0, 1):
            with handle.using(keep=keep) as call:
                answered(t)
                kept.append(sum(len(cut.kept[0]) for cut in call.cuts))
    assert kept[0] == kept[2] > kept[1] == 0


def test_blocks_nest() -> None:
    t = tiny.load("llava")
    dense = answered(t)
    with squeeze.applied(t.model, "fastv", ratio=0.5) as handle:
        with handle.using(ratio=0.9) as outer:
            high = answered(t)
            with handle.using(off=True) as off:
                assert same(answered(t), dense)
                with pytest.raises(NotAppliedError, match="off=True"):
                    off.report()
            with handle.using() as only_reports:
                assert same(answered(t), high)
            assert torch.equal(only_reports.cuts[0].index, outer.cuts[0].index)
        assert not same(answered(t), high)


def test_switch() -> None:
    t = tiny.fresh("llava")
    before, dense = snapshot.snapshot(t.model), answered(t)
    expected = {}
    for method in METHODS:
        with squeeze.applied(t.model, method, ratio=0.75):
            expected[method] = answered(t)
    handle = squeeze.apply(t.model, "fastv", ratio=0.5)
    for method in METHODS:
        handle.switch(method, ratio=0.75)
        assert handle.method == method
        assert same(answered(t), expected[method])
        assert handle.report().record.method == method
        with pytest.raises(SqueezeError):
            handle.switch("fastv", ratio=2)
        with pytest.raises(SqueezeError):
            handle.switch("fastv", layer=99)
        assert handle.method == method
        assert same(answered(t), expected[method])
    with handle.using(ratio=0.5):
        handle.switch("fastv", ratio=0.75)
        with pytest.raises(UnsupportedInputError, match="switched"):
            answered(t)
    assert same(answered(t), expected["fastv"])
    handle.remove()
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert same(answered(t), dense)


def test_no_switch_inside_of_a_call() -> None:
    t = tiny.fresh("llava")
    handle = squeeze.apply(t.model, "fastv", ratio=0.5)
    expected, found = answered(t), []
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(60)

    hook = oracle.text_model(t.model).layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(answered(t)))
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(InUseError, match="Another thread"):
            handle.switch("divprune", ratio=0.5)
    finally:
        go_on.set()
        thread.join(60)
        hook.remove()
    assert same(found[0], expected)

    def switch(*_: Any) -> None:
        handle.switch("divprune", ratio=0.5)

    hook = oracle.text_model(t.model).layers[1].register_forward_pre_hook(switch)
    with pytest.raises(InUseError, match="This thread"):
        answered(t)
    hook.remove()
    assert handle.method == "fastv"
    assert same(answered(t), expected)
    # A squeezed model that waits for the garbage collector would show in the tables that other tests compare.
    handle.remove()
