"""Every method that ships, once: identity, one exact cut, its own count; and the same for methods of other packages.

The other contracts run on one method per way of working (`matrix.WAYS`). What hangs on the rule itself is proved by the
tests of the reducers, by slow references and by what the authors' code did (tests/unit, tests/golden).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar
from zlib import crc32

import pytest
import torch

import matrix
import mllm_squeeze as squeeze
import oracle
import snapshot
import tiny
import ways
from contract.test_equivalence import check_counts, check_cuts, squeeze_and_prove
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, Projection
from mllm_squeeze.registry import register_reducer, unregister_method, unregister_reducer


def home(name: str) -> tuple[str, str]:
    """Return (family, kind): one of those that fit, chosen by the name; a video or a sound where it takes no image."""
    if matrix.method(name).wants_text_encoder:
        # Whose tower is as wide as that of the text encoder.
        return ("llava", "image") if "image" in matrix.method(name).modalities else ("llava_onevision", "video")
    for kind, among in (("image", matrix.FAMILIES), ("video", matrix.FAMILIES), ("audio", tiny.ALL_FAMILIES)):
        families = [f for f in among if kind in tiny.kinds(f) and matrix.fits(name, f, kind)]
        if families:
            return families[crc32(name.encode()) % len(families)], kind
    raise AssertionError(f"no family fits '{name}': add one to tiny.CORE_FAMILIES that does")


def prove(name: str) -> None:
    """Nothing changes at ratio 0, a cut equals masking, the count is the rule's, and all is put back."""
    family, kind = home(name)
    t = tiny.load(family)
    inputs, forced = t.inputs[kind], oracle.forced_tokens(1, 3)
    dense, generated = oracle.run(t.model, inputs, forced), oracle.generate(t.model, inputs, forced)
    before = snapshot.snapshot(t.model)
    if matrix.method(name).nothing:
        with matrix.applied(t.model, name, **matrix.method(name).nothing):
            same = oracle.run(t.model, inputs, forced)
            assert torch.equal(same.prefill, dense.prefill)
            assert torch.equal(same.decode, dense.decode)
            assert torch.equal(oracle.generate(t.model, inputs, forced), generated)
    handle = squeeze_and_prove(t, inputs, name)
    check_cuts(t, inputs, handle)
    check_counts(handle, name)
    snapshot.assert_same(before, snapshot.snapshot(t.model))


@pytest.mark.parametrize("name", matrix.ALL)
def test_a_method_that_ships(name: str) -> None:
    prove(name)


def test_every_way_has_a_representative_and_every_method_a_way() -> None:
    """The lists hold all there is: what `methods()` names is proved, and each way stands in the matrix."""
    assert set(matrix.ALL) <= set(squeeze.methods())
    ready = [name for name in matrix.ALL if not matrix.method(name).wants_text_encoder]
    groups = ways.by_way(ready)
    assert sorted(name for names in groups.values() for name in names) == sorted(ready)
    assert all(len(set(names) & set(matrix.WAYS)) == 1 for names in groups.values())
    assert set(matrix.EVERYWHERE) <= set(matrix.WAYS)
    met = {cell.values[1] for cell in matrix.cells()}
    # The families of the core take no sound; those of tests/families do.
    deaf = {
        n for n in matrix.WAYS if matrix.method(n).modalities != ("audio",) and "sound" not in ways.method(n).way.roads
    }
    assert met == deaf, "a way meets no family"


def test_the_word_merges_is_true() -> None:
    """`merges` decides what the oracle writes, so a rule that merges and does not say so must be found out."""
    t = tiny.load("llava")
    inputs, forced = t.inputs["image"], oracle.forced_tokens(1, 2)
    with matrix.applied(t.model, matrix.MERGED_BEFORE) as handle:
        squeezed = oracle.run(t.model, inputs, forced)
        cuts, repack = handle.cuts, matrix.repacks(handle)
    unmerged = oracle.masked_logits(t.model, inputs, cuts, forced, None, repack)
    assert oracle.gap(squeezed.decode, unmerged.decode) > 20 * oracle.TOLERANCE


# What another package may bring


class LoudestKeys(Reducer):
    """Keep the tokens whose keys of the layer before are longest; with `fold`, add the others to the first of them."""

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    merges: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        """Return the keys."""
        return (Projection(),)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the loudest; what is dropped goes to the first survivor."""
        length = tokens[Projection()].float().norm(dim=-1).masked_fill(~tokens.mask, -1)
        rank = length.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = tokens.mask & (rank < tokens.budget[:, None])
        place = torch.arange(keep.shape[1]).expand_as(keep)
        first = keep.int().argmax(1, keepdim=True)
        return Reduction(keep, torch.where(keep, place, first.expand_as(place)).masked_fill(~tokens.mask, -1))


FOREIGN: dict[str, dict[str, Any]] = {
    "quiet_tail": {
        "params": {"ratio": 0.6, "layer": 30},
        "steps": [{"reducer": "loudest_keys", "at": {"layer": "${layer}"}, "ratio": "${ratio}"}],
    },
    "two_places": {
        "positions": "repack",
        "params": {"early": 0.25, "ratio": 0.5, "layers": [8, 20]},
        "steps": [
            {"select": "farthest_point", "at": "projector", "ratio": "${early}"},
            {"reducer": "loudest_keys", "at": {"layers": "${layers}"}, "ratio": "${ratio}"},
        ],
    },
}


@pytest.fixture
def foreign() -> Iterator[None]:
    """Register what another package would bring."""
    register_reducer("loudest_keys", LoudestKeys)
    for name, recipe in FOREIGN.items():
        squeeze.register_method(name, {"method": name, **recipe})
    yield
    for name in FOREIGN:
        unregister_method(name)
    unregister_reducer("loudest_keys")


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_method_of_another_package(name: str) -> None:
    """Its way, its parameters for few layers and its proof follow from the recipe; no list names it."""
    way = matrix.method(name).way
    assert way.merges and "layer" in way.roads
    assert name in ways.representatives([*matrix.ALL, name])
    prove(name)


@pytest.mark.usefixtures("foreign")
def test_a_rule_that_hides_its_merging_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoudestKeys, "merges", False)
    monkeypatch.setattr(ways, "_method", ways._method.__wrapped__)
    assert not matrix.method("quiet_tail").merges
    with pytest.raises(AssertionError, match="largest difference"):
        prove("quiet_tail")
