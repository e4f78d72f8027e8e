"""State belongs to one prefill and its cache: calls that interleave do not meet."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_role
import matrix
import oracle
import tiny

STEPS = 5
KINDS = ("two_images", "image")
METHODS = matrix.EVERYWHERE


def answers(t: tiny.TinyModel, kind: str) -> Tensor:
    """Return the logits of a forced generate."""
    return oracle.generate(t.model, t.inputs[kind], oracle.forced_tokens(1, STEPS))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_b_a_gives_a_twice(family: str, method: str) -> None:
    t = tiny.load(family)
    with matrix.applied(t.model, method):
        first = answers(t, "image")
        middle = answers(t, "two_images")
        with pytest.warns(UserWarning, match="no image"):
            answers(t, "text")
        assert torch.equal(first, answers(t, "image"))
        assert torch.equal(middle, answers(t, "two_images"))


class HandLoop:
    """Prefill and decode one step at a time, so that two of them can take turns."""

    def __init__(self, model: Any, inputs: tiny.Inputs, seed: int) -> None:
        self.model, self.inputs = model, inputs
        self.forced = oracle.forced_tokens(1, STEPS, seed)
        self.where = oracle.positions(model, inputs, STEPS)
        self.width = inputs["input_ids"].shape[1]
        self.cache: Any = None
        self.logits: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        """Run the prefill, or the next token."""
        t = len(self.logits)
        if t == 0:
            out = self.model(**self.inputs, position_ids=self.where[..., : self.width], use_cache=True)
        else:
            at = self.where[..., self.width + t - 1 : self.width + t]
            token = self.forced[:, t - 1 : t]
            out = self.model(input_ids=token, position_ids=at, **cache_role.given(self.cache), use_cache=True)
        self.cache = cache_role.of_output(out)
        self.logits.append(out.logits[:, -1])

    def run(self) -> Tensor:
        """Run all steps."""
        for _ in range(STEPS + 1):
            self.step()
        return torch.stack(self.logits, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_two_caches_take_turns(family: str, method: str, implementation: str) -> None:
    t = tiny.load(family)
    with matrix.attention(t.model, implementation), matrix.applied(t.model, method):
        alone = [HandLoop(t.model, t.inputs[kind], seed).run() for seed, kind in enumerate(KINDS)]
        loops = [HandLoop(t.model, t.inputs[kind], seed) for seed, kind in enumerate(KINDS)]
        for _ in range(STEPS + 1):
            for loop in loops:
                loop.step()
    for loop, expected in zip(loops, alone, strict=True):
        assert torch.equal(torch.stack(loop.logits, 1), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_two_threads_give_what_two_turns_give(family: str, method: str) -> None:
    t = tiny.load(family)
    rounds = 4
    with matrix.applied(t.model, method):
        expected = [HandLoop(t.model, t.inputs[kind], seed).run() for seed, kind in enumerate(KINDS)]
        got: list[list[Tensor]] = [[], []]
        errors: list[BaseException] = []
        barrier = threading.Barrier(2)

        def work(n: int) -> None:
            try:
                for _ in range(rounds):
                    loop = HandLoop(t.model, t.inputs[KINDS[n]], n)
                    barrier.wait(30)
                    got[n].append(loop.run())
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors, errors
    for n in range(2):
        assert len(got[n]) == rounds
        assert all(torch.equal(logits, expected[n]) for logits in got[n])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_deep_copy_of_the_cache_decodes_on(family: str, method: str) -> None:
    """A prompt prefilled once can be continued twice, each time from a copy of its cache."""
    t = tiny.load(family)
    with matrix.applied(t.model, method):
        expected = [HandLoop(t.model, t.inputs["image"], seed) for seed in (3, 4)]
        for loop in expected:
            loop.run()
        shared = HandLoop(t.model, t.inputs["image"], 3)
        shared.step()
        twin = HandLoop(t.model, t.inputs["image"], 4)
        twin.cache, twin.logits = copy.deepcopy(shared.cache), list(shared.logits)
        for _ in range(STEPS):
            shared.step()
            twin.step()
    for loop, want in zip((shared, twin), expected, strict=True):
        assert torch.equal(torch.stack(loop.logits, 1), torch.stack(want.logits, 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_dropped_caches_free_their_memory(family: str, method: str) -> None:
    """Nothing keeps a cache, or what belongs to it, alive once the caller has let go of it."""
    import gc
    import weakref

    t = tiny.load(family)
    with matrix.applied(t.model, method):
        loop = HandLoop(t.model, t.inputs["image"], 3)
        loop.run()
        cache = weakref.ref(loop.cache)
        del loop
        gc.collect()
        assert cache() is None


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_the_cache_answers_the_tokens_seen(family: str) -> None:
    """Layers hold fewer entries than they have seen; transformers asks for the tokens seen."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    width = inputs["input_ids"].shape[1]
    for method in ("divprune", "fastv"):
        with matrix.applied(t.model, method) as handle:
            cache = oracle.run(t.model, inputs, forced).cache
            cut = handle.cuts[0]
        for i in range(4):
            assert cache.get_seq_length(i) == width + 2, f"{method}, layer {i}"
            held = cache.layers[i].keys.shape[-2]
            assert held == (len(cut.kept[0]) if i >= cut.layer else width) + 2, f"{method}, layer {i}"
