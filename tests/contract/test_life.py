"""The life of calls: hooks of the user that copy arguments, interrupts at any line, threads, text after pictures."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
from mllm_squeeze.errors import AlreadyAppliedError, NotAppliedError, SqueezeError

LIBRARY = str(Path(squeeze.__file__).parent)
SAMPLED = 16


def copied(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand on equal arguments in another dict, as hooks do that change one of them."""
    return args, dict(kwargs)


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], **settings: Any) -> Iterator[None]:
    """Hook a module inside the block."""
    handle = module.register_forward_pre_hook(hook, **settings)
    try:
        yield
    finally:
        handle.remove()


# Hooks of the user


@pytest.mark.parametrize("where", ["model", "inner model", "text model", "layer"])
@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", matrix.REPRESENTATIVE)
def test_a_hook_that_copies_arguments(family: str, method: str, where: str) -> None:
    """It was put on after apply, so the arguments that ours handed on are gone when the module runs."""
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    text = oracle.text_model(t.model)
    module = {"model": t.model, "inner model": t.model.model, "text model": text, "layer": text.layers[2]}[where]
    with matrix.applied(t.model, method) as handle:
        expected = oracle.run(t.model, inputs, forced)
        kept = handle.cuts[0].index
        with hooked(module, copied, with_kwargs=True):
            got = oracle.run(t.model, inputs, forced)
        assert torch.equal(handle.cuts[0].index, kept)
    assert torch.equal(got.prefill, expected.prefill)
    assert torch.equal(got.decode, expected.decode)


def test_a_hook_that_copies_arguments_of_cross_attention() -> None:
    t = tiny.load("mllama")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 3)
    with squeeze.applied(t.model, "random", ratio=0.5) as handle:
        expected = oracle.generate(t.model, inputs, forced)
        with hooked(oracle.text_model(t.model), copied, with_kwargs=True):
            got = oracle.generate(t.model, inputs, forced)
        assert handle.report().visual_after < handle.report().visual_before
    assert torch.equal(got, expected)


# Interrupts


def lines_run(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """Return each line of the library that a call runs, in the order in which they are reached."""
    seen: dict[tuple[str, int], None] = {}

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen[frame.f_code.co_filename, frame.f_lineno] = None
        return local

    traced(call, local)
    return list(seen)


def traced(call: Callable[[], Any], local: Any) -> None:
    """Run a call with a trace function in all frames of the library."""
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(LIBRARY) else None)
    try:
        call()
    finally:
        sys.settrace(before)


def interrupt_at(place: tuple[str, int], call: Callable[[], Any]) -> None:
    """Press Ctrl-C when a call reaches a line for the first time."""
    pressed = False

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal pressed
        if event == "line" and not pressed and (frame.f_code.co_filename, frame.f_lineno) == place:
            pressed = True
            raise KeyboardInterrupt
        return local

    with pytest.raises(KeyboardInterrupt):
        traced(call, local)


def sampled(lines: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return some of the lines, the same in each run."""
    return random.Random(5).sample(lines, min(SAMPLED, len(lines)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "method", "files"),
    [
        ("llava", "pyramiddrop", {"preview.py"}),
        ("llava", "visionzip", {"encoder.py"}),
        ("llava", "pyramiddrop", None),
        ("qwen2_5_vl", "fastv", None),
        ("llava", "tome", None),
    ],
)
def test_an_interrupt_at_any_line(family: str, method: str, files: set[str] | None) -> None:
    """Ctrl-C in the middle of the library: the next call is right, and remove() puts all back.

    files: those of the engine that mark what runs now, in which each line is tried; None for some lines of all files.
    """
    t = tiny.load(family)
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 1)
    grad = torch.is_grad_enabled()

    def run() -> Tensor:
        return oracle.generate(t.model, inputs, forced)

    dense = run()
    before = snapshot.snapshot(t.model)
    with matrix.applied(t.model, method):
        good = run()
        lines = lines_run(run)
        places = sampled(lines) if files is None else [place for place in lines if Path(place[0]).name in files]
        assert len(places) > 10
        for place in places:
            interrupt_at(place, run)
            torch.set_grad_enabled(grad)
            assert torch.equal(run(), good), place
    snapshot.assert_same(before, snapshot.snapshot(t.model))
    assert torch.equal(run(), dense)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_interrupt_whose_traceback_is_kept() -> None:
    """A notebook keeps the last traceback, and with it all that was alive in the call."""
    t = tiny.load("llava")
    inputs = t.inputs["image"]
    text = oracle.text_model(t.model)
    embeds = t.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        dense = text(inputs_embeds=embeds).last_hidden_state

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    with matrix.applied(t.model, "divprune"), torch.no_grad():
        with hooked(text.layers[2], press), pytest.raises(KeyboardInterrupt) as kept:
            t.model(**inputs)
        alone = text(inputs_embeds=embeds).last_hidden_state
        assert kept.value.__traceback__ is not None
    assert torch.equal(alone, dense)


# Threads


class Paused:
    """A generate in another thread that waits in the middle of a forward until `go_on`."""

    def __init__(self, model: Any, inputs: tiny.Inputs, forced: Tensor) -> None:
        self.answer: Tensor | None = None
        self._inside, self._on = threading.Event(), threading.Event()
        self._hook = oracle.text_model(model).layers[1].register_forward_pre_hook(self._wait)
        self._thread = threading.Thread(target=self._run, args=(model, inputs, forced))
        self._thread.start()
        assert self._inside.wait(60)

    def _wait(self, *_: Any) -> None:
        if threading.current_thread() is self._thread and not self._inside.is_set():
            self._inside.set()
            self._on.wait(60)

    def _run(self, model: Any, inputs: tiny.Inputs, forced: Tensor) -> None:
        self.answer = oracle.generate(model, inputs, forced)

    def go_on(self) -> Tensor:
        """Let it finish; returns its answer."""
        self._on.set()
        self._thread.join(60)
        self._hook.remove()
        assert self.answer is not None, "the other thread failed"
        return self.answer


def test_disabled_is_for_one_thread() -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    dense = oracle.generate(t.model, inputs, forced)
    with matrix.applied(t.model, "divprune") as handle:
        squeezed = oracle.generate(t.model, inputs, forced)
        answers: list[Tensor] = []
        with handle.disabled():
            other = threading.Thread(target=lambda: answers.append(oracle.generate(t.model, inputs, forced)))
            other.start()
            other.join(60)
            with handle.disabled():
                assert torch.equal(oracle.generate(t.model, inputs, forced), dense)
            assert torch.equal(oracle.generate(t.model, inputs, forced), dense)
        assert torch.equal(answers[0], squeezed)
        assert torch.equal(oracle.generate(t.model, inputs, forced), squeezed)


def test_remove_while_another_thread_generates() -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    before = snapshot.snapshot(t.model)
    handle = squeeze.apply(t.model, "divprune", ratio=0.5)
    expected = oracle.generate(t.model, inputs, forced)
    paused = Paused(t.model, inputs, forced)
    try:
        with pytest.raises(SqueezeError, match="thread"):
            handle.remove()
        with pytest.raises(SqueezeError, match="thread"):
            squeeze.remove(t.model)
    finally:
        answer = paused.go_on()
    assert torch.equal(answer, expected)
    handle.remove()
    snapshot.assert_same(before, snapshot.snapshot(t.model))


def test_apply_while_another_thread_generates() -> None:
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    expected = oracle.generate(t.model, inputs, forced)
    paused = Paused(t.model, inputs, forced)
    inside = snapshot.snapshot(t.model)
    try:
        with pytest.raises(SqueezeError, match="thread"):
            squeeze.apply(t.model, "divprune", ratio=0.5)
        with pytest.raises(SqueezeError, match="thread"):
            squeeze.check(t.model, run=True)
        snapshot.assert_same(inside, snapshot.snapshot(t.model))
        # Another model is free.
        with matrix.applied(tiny.fresh("llava").model, "divprune"):
            pass
    finally:
        answer = paused.go_on()
    assert torch.equal(answer, expected)
    with matrix.applied(t.model, "divprune"):
        pass


# Compiled models


def wrapped(model: Any) -> Any:
    """Compile the whole model as torch.compile does."""
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    """Compile the whole model in place."""
    model.compile(backend="eager")
    return model


def by_forward(model: Any) -> Any:
    """Compile the forward of the whole model."""
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def text_model_alone(model: Any) -> Any:
    """Compile the text model in place."""
    model.model.language_model.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("compiled", [wrapped, in_place, by_forward, text_model_alone])
def test_a_model_that_was_compiled_before(compiled: Callable[[Any], Any]) -> None:
    """torch.compile does not look for hooks that came after it compiled."""
    t = tiny.fresh("llava")
    inputs = t.inputs["image"]
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            dense = t.model(**inputs).logits
            with matrix.applied(t.model, "divprune"):
                squeezed = t.model(**inputs).logits
            run = compiled(t.model)
            oracle.assert_close(run(**inputs).logits, dense, "compiled")
            with matrix.applied(run, "divprune") as handle:
                got = run(**inputs).logits
                assert handle.report().visual_after < handle.report().visual_before
            again = run(**inputs).logits
        oracle.assert_close(got, squeezed, "squeezed")
        oracle.assert_close(again, dense, "removed")
    finally:
        torch._dynamo.reset()


def test_a_wrapper_of_torch_compile_inside_the_model() -> None:
    """Hooks on the wrapper would not see what the text model is called with."""
    t = tiny.fresh("llava")
    t.model.model.language_model = torch.compile(t.model.model.language_model, backend="eager")
    with pytest.raises(SqueezeError, match="text model.*OptimizedModule.*in place"):
        squeeze.apply(t.model, "divprune", ratio=0.5)


def test_a_wrapper_of_torch_compile_has_the_same_handle() -> None:
    t = tiny.fresh("llava")
    wrapper = torch.compile(t.model, backend="eager")
    squeeze.apply(wrapper, "divprune", ratio=0.5)
    with pytest.raises(AlreadyAppliedError):
        squeeze.apply(t.model, "divprune", ratio=0.5)
    squeeze.remove(t.model)
    with pytest.raises(NotAppliedError):
        squeeze.remove(wrapper)


# What a handle keeps


def test_a_handle_lets_go_of_the_model() -> None:
    """A handle that is kept, applied or removed, keeps its report and no model."""
    for remove in (True, False):
        t = tiny.fresh("llava")
        handle = squeeze.apply(t.model, "fastv", ratio=0.5, layer=2)
        oracle.run(t.model, t.inputs["image"], oracle.forced_tokens(1, 1))
        if remove:
            handle.remove()
        gone = weakref.ref(t.model)
        del t
        gc.collect()
        assert gone() is None
        assert handle.model is None
        assert handle.report().visual_after < handle.report().visual_before
        if not remove:
            handle.remove()
        with pytest.raises(NotAppliedError):
            handle.remove()


def test_pickles_are_refused() -> None:
    """A pickle would carry the hooks; the message is that of a deep copy, and a pickle made after remove() is free."""
    t = tiny.fresh("llava")
    for method in ("fastv", "visionzip"):
        with matrix.applied(t.model, method):
            for save in (pickle.dumps, copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
                with pytest.raises(SqueezeError, match=f"'{method}'.*remove"):
                    save(t.model)
    pickle.dumps(t.model)


# Text after pictures


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "method"),
    [("llava", "divprune"), ("llava", "fastv"), ("qwen2_5_vl", "divprune"), ("mllama", "random")],
)
def test_a_prompt_without_pictures_is_the_last_one(family: str, method: str) -> None:
    """Its decode steps leave the report alone; a prompt without pictures clears it."""
    t = tiny.load(family)
    pictures = t.inputs["image"]
    text = {"input_ids": torch.randint(40, 95, (1, 9), generator=torch.Generator().manual_seed(0))}
    with squeeze.applied(t.model, method, ratio=0.5) as handle:
        t.model.generate(**pictures, max_new_tokens=3, do_sample=False)
        assert handle.layout is not None
        assert handle.report().visual_after < handle.report().visual_before
        t.model.generate(**text, max_new_tokens=3, do_sample=False)
        assert handle.cuts == ()
        assert handle.layout is None
        with pytest.raises(NotAppliedError, match="no visual tokens"):
            handle.report()
        t.model.generate(**pictures, max_new_tokens=3, do_sample=False)
        assert handle.report().visual_before
