"""What was made of objects is kept by what they are, and they are held as long."""

from __future__ import annotations

import weakref

import torch

from mllm_squeeze.engine.sequence.memo import Memo


class Thing:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_the_same_objects_give_what_was_made() -> None:
    memo, mask = Memo(), torch.ones(2)
    first = memo.once("mask", mask, 3, None, make=object)
    assert memo.once("mask", mask, 3, None, make=object) is first
    assert memo.once("mask", mask, 4, None, make=object) is not first
    assert memo.once("rows", mask, 3, None, make=object) is not first


def test_an_equal_object_is_another_one() -> None:
    memo = Memo()
    one, other = Thing(), Thing()
    assert memo.once("mask", one, make=object) is not memo.once("mask", other, make=object)


def test_an_object_is_held_so_that_its_id_is_not_used_again() -> None:
    memo, thing = Memo(), Thing()
    gone = weakref.ref(thing)
    memo.once("mask", thing, make=object)
    del thing
    assert gone() is not None
    memo.clear()
    assert gone() is None


def test_copies_do_not_pile_up() -> None:
    """accelerate hands each layer a mask of its own; what was made of other objects stays."""
    memo, entries = Memo(), Thing()
    rows = memo.once("rows", entries, make=object)
    masks = [Thing() for _ in range(40)]
    held = [weakref.ref(mask) for mask in masks]
    for mask in masks:
        memo.once("mask", mask, make=object)
    del masks, mask
    assert sum(one() is not None for one in held) == 8
    assert memo.once("rows", entries, make=object) is rows
