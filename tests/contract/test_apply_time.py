"""Applying a method is cheap enough to be done around every request."""

from __future__ import annotations

import statistics
import time

import pytest

import mllm_squeeze as squeeze
import tiny


@pytest.mark.quick
@pytest.mark.parametrize("method", ["fastv", "visionzip", "sparsevlm"])
def test_apply_and_remove_take_few_milliseconds(method: str) -> None:
    """In time on the cores: other processes must not make it fail. The first one imports and reads."""
    model = tiny.load("llava").model
    squeeze.apply(model, method, ratio=0.5).remove()
    taken = []
    for number in range(9):
        begin = time.process_time()
        squeeze.apply(model, method, ratio=0.1 * (number + 1)).remove()
        taken.append(time.process_time() - begin)
    assert statistics.median(taken) < 0.02
