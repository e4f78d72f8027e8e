"""What every reducer promises: pure, batched, exact in its budget, without host sync, in any dtype."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_origin

import pytest
import torch
from reference.spans import LENGTHS, TILES, answer, batch, of_all, of_text, share, spans_with
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_squeeze import ops
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.recipe.steps import PIPELINE
from mllm_squeeze.reducers.base import Among, DecodeReducer, Reducer, Signals
from mllm_squeeze.reducers.needs import Attention, EncoderAttention, Features
from mllm_squeeze.registry import BUILTIN_REDUCERS, configs_dir, reducer_class

# Numbers that are worth a try beside the defaults; a reducer needs no line here.
OTHER_NUMBERS = {
    "text_rank_recycle": {"share": 0.6, "per_cluster": 3},
}
# The engine leaves them out before a rule is asked.
OUTSIDE = {"separators"}


def choices(cls):
    """Options that change one parameter at a time to each word, or truth, that it may be; the defaults first."""
    yield {}
    for name, field in cls.model_fields.items():
        kind = field.annotation
        words = (True, False) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
        if name not in OUTSIDE:
            yield from ({name: word} for word in words if word != field.default)


def built_in():
    """Reducers of all classes that ship and choose tokens of a prompt by themselves."""
    for name in BUILTIN_REDUCERS:
        cls = reducer_class(name)
        if cls.model_fields.keys() >= {"select"} or issubclass(cls, DecodeReducer):
            continue  # a pipeline is what its recipes make of it; the other one is tested in test_reducers_video.py
        options = [*choices(cls), *([OTHER_NUMBERS[name]] if name in OTHER_NUMBERS else [])]
        yield from (cls(**given) for given in options)


def of_recipes():
    """The rules of all steps of all methods that ship."""
    for path in configs_dir().glob("*.yaml"):
        for step in load_recipe(path.stem).steps:
            if not isinstance(step.built, DecodeReducer):
                yield step.built.model_copy(update={"separators": "compete"})


REDUCERS = list({repr(r): r for r in (*built_in(), *of_recipes())}.values())
every_reducer = pytest.mark.parametrize("reducer", REDUCERS, ids=repr)


def spans(seed=0, dtype=torch.float32):
    return spans_with(dict.fromkeys(need for r in REDUCERS for need in (*r.needs(), *r.row_needs())), seed, dtype)


def test_every_reducer_is_tested():
    kinds = {type(r) for r in REDUCERS}
    left = {name for name in BUILTIN_REDUCERS if reducer_class(name) not in kinds}
    assert all(name == PIPELINE or issubclass(reducer_class(name), DecodeReducer) for name in left)
    assert len(REDUCERS) > len(BUILTIN_REDUCERS)


@every_reducer
@pytest.mark.parametrize("seed", range(3))
def test_a_row_of_a_batch_is_what_it_is_alone(reducer, seed):
    data, budgets = spans(seed), share(0.45)
    together = reducer.reduce(batch(data, budgets))
    wider = reducer.reduce(batch(data, budgets, width=90))
    backwards = reducer.reduce(batch(data, budgets, rows=reversed(range(5))))
    for row in range(5):
        alone = answer(reducer.reduce(batch(data, budgets, rows=[row])), 0)
        for other in (answer(together, row), answer(wider, row), answer(backwards, 4 - row)):
            assert other[0] == alone[0]
            if alone[1] is not None:
                assert other[1] == alone[1]


@every_reducer
def test_the_result_is_well_formed(reducer):
    data = spans()
    for fraction in (0.3, 0.5, 0.8):
        tokens = batch(data, share(fraction), width=80)
        out = reducer.reduce(tokens)
        assert out.keep.dtype == torch.bool
        assert out.keep.shape == tokens.mask.shape
        assert not (out.keep & ~tokens.mask).any()
        if out.assign is not None:
            place = torch.arange(80).expand_as(out.assign)
            assert out.assign.dtype == torch.int64
            assert torch.equal(out.assign == place, out.keep)
            assert (out.assign[~tokens.mask] == -1).all()
            assert out.keep.gather(1, out.assign.clamp(min=0))[out.assign >= 0].all()
        if out.weights is not None:
            assert out.weights.dtype == torch.float32


def at_most(reducer):
    """True of a rule that says that it fits a video into its budget, whatever that leaves of it."""
    return "never more than asked for" in " ".join((type(reducer).__doc__ or "").split())


@every_reducer
@pytest.mark.parametrize("fraction", [0.02, 0.26, 0.5, 0.77, 0.98])
def test_the_count_is_what_was_said(reducer, fraction):
    budgets = share(fraction)
    kept = reducer.reduce(batch(spans(), budgets)).keep.sum(1).tolist()
    if reducer.facts.known_count:
        assert kept == [reducer.count(n, k, t) for n, k, t in zip(LENGTHS, budgets, TILES, strict=True)]
    elif at_most(reducer):
        assert all(1 <= k <= b for k, b in zip(kept, budgets, strict=True))
    # A rule with a reason of its own may leave more; above 0.9, frames that may not grow leave some of it unused.
    elif not reducer.facts.decides and fraction < 0.9 and reducer.facts.why_more == Reducer.why_more:
        frames = [tile.frames for (tile,) in TILES]
        # A frame keeps one token at least, and all of its tokens at most.
        bounds = zip(kept, budgets, frames, LENGTHS, strict=True)
        assert all(-f - n // 10 <= k - b <= f for k, b, f, n in bounds)


@every_reducer
def test_a_budget_of_all_changes_nothing(reducer):
    budgets = [n + (i % 2) * 5 for i, n in enumerate(LENGTHS)]
    tokens = batch(spans(), budgets)
    out = reducer.reduce(tokens)
    assert torch.equal(out.keep, tokens.mask)
    if out.assign is not None:
        weights = ops.mean_weights(out.assign) if out.weights is None else out.weights
        merged = ops.merge_tokens(tokens.features, out.assign, weights)
        assert torch.equal(merged[tokens.mask], tokens.features[tokens.mask])


@every_reducer
def test_it_is_pure(reducer):
    tokens = batch(spans(), share(0.4))
    tensors = [tokens.features, tokens.mask, tokens.budget, tokens.grid, *tokens.signals.values()]
    before = [t.clone() for t in tensors]
    other = batch(spans(5), share(0.7))
    state = torch.get_rng_state()
    first = reducer.reduce(tokens)
    reducer.reduce(other)
    second = reducer.reduce(tokens)
    assert [answer(first, i) for i in range(5)] == [answer(second, i) for i in range(5)]
    for old, new in zip(before, tensors, strict=True):
        torch.testing.assert_close(old, new, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


class NoSync(TorchDispatchMode):
    """Fails where a tensor's values would have to be read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_"):
            indices = [t for t in args[1] if t is not None]
            assert all(t.dtype != torch.bool for t in indices), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


def waiting(reducer):
    """Names of a rule and of its parts that say that they wait for the device: in rounds that the data decide."""
    own = [*reducer._parts()] if hasattr(reducer, "_parts") else []
    said = {type(one).__name__: " ".join((type(one).__doc__ or "").split()) for one in (reducer, *own)}
    return {name for name, words in said.items() if "waits for the device" in words}


def test_few_rules_wait_for_the_device():
    names = set().union(*map(waiting, REDUCERS))
    assert names == {
        "BoundedPeaks",
        "DynamicDensity",
        "FrameResolution",
        "FrameRuns",
        "FrameTrees",
        "LinkComponents",
        "PrincipalGroups",
        "SoundGuided",
        "Spectrum",
        "SquareTrees",
        "SteadyClusters",
        "StillSegments",
    }


@every_reducer
def test_nothing_waits_for_the_device(reducer):
    if waiting(reducer):
        pytest.skip("it says so")
    tokens = batch(spans(), share(0.4))
    reducer.reduce(tokens)  # patterns that are made once per grid are made on the host
    with NoSync():
        reducer.reduce(tokens)


def test_the_watch_for_syncs_sees_them():
    for read in (lambda t: t.item(), bool, lambda t: t.nonzero(), lambda t: t[None][t[None] > 0]):
        with NoSync(), pytest.raises(AssertionError):
            read(torch.tensor(1.0))


@every_reducer
def test_half_precision_chooses_as_its_values_in_float32_do(reducer):
    data = spans(dtype=torch.bfloat16)

    def lift(value):
        if isinstance(value, dict):
            return {name: lift(v) for name, v in value.items()}
        return [v.float() for v in value]

    half, full = reducer.reduce(batch(data, share(0.4))), reducer.reduce(batch(lift(data), share(0.4)))
    assert [answer(half, i) for i in range(5)] == [answer(full, i) for i in range(5)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = reducer.reduce(batch(lift(data), share(0.4)))
    assert [answer(mixed, i) for i in range(5)] == [answer(full, i) for i in range(5)]


@every_reducer
def test_tokens_left_out_of_the_candidates_play_no_part(reducer):
    """Separators that the engine keeps are holes in the mask."""
    tokens = batch(spans(), share(0.4))
    rows, width = tokens.mask.shape
    place = torch.arange(width) * 3 // 2  # every third column is a hole
    wide = int(place[-1]) + 1

    def spread(x, hole):
        hole = hole if x.dtype != torch.int64 or hole == hole else 99
        out = torch.full((rows, wide, *x.shape[2:]), hole, dtype=x.dtype)
        out[:, place] = x
        return out

    def spread_signal(need, x):
        if of_text(need) or of_all(need):
            return x
        tokens_last = isinstance(need, (Attention, EncoderAttention))
        return spread(x.movedim(-1, 1), float("nan")).movedim(1, -1) if tokens_last else spread(x, float("nan"))

    holes = dataclasses.replace(
        tokens,
        mask=spread(tokens.mask, False),
        grid=spread(tokens.grid, -1),
        origin=torch.arange(wide).expand(rows, wide),
        signals=Signals({need: spread_signal(need, x) for need, x in tokens.signals.items()}),
        among={need: Among(one.present, spread(one.place, 0)) for need, one in tokens.among.items()},
    )
    dense, sparse = reducer.reduce(tokens), reducer.reduce(holes)
    assert torch.equal(sparse.keep, spread(dense.keep, False))
    if dense.assign is not None:
        moved = torch.where(dense.assign < 0, -1, place[dense.assign.clamp(min=0)])
        assert torch.equal(sparse.assign, spread(moved, -1))


@every_reducer
def test_gradients_reach_what_was_merged(reducer):
    """A rule that merges says so in its facts; one whose options turn that off may say it all the same."""
    tokens = batch(spans(), share(0.4))
    features = tokens.features.nan_to_num().requires_grad_()
    out = reducer.reduce(dataclasses.replace(tokens, signals=Signals({**tokens.signals, Features(): features})))
    if out.assign is None:
        return
    assert reducer.facts.merges
    weights = ops.mean_weights(out.assign) if out.weights is None else out.weights
    merged = ops.merge_tokens(features, out.assign, weights)
    merged.masked_fill(~out.keep[..., None], 0).sum().backward()
    assert ((features.grad != 0).all(-1) == (out.assign >= 0)).all()


@every_reducer
def test_inference_mode_and_no_grad_do_not_matter(reducer):
    data = spans()
    plain = reducer.reduce(batch(data, share(0.4)))
    with torch.inference_mode():
        inside = reducer.reduce(batch(data, share(0.4)))
    assert [answer(plain, i) for i in range(5)] == [answer(inside, i) for i in range(5)]
