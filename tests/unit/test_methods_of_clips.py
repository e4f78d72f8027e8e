"""Methods for videos in front of the language model: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference.build import circle

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip(method: str, frames: torch.Tensor, grid: Any = None, **params: Any) -> Any:
    """Run a method on frames (T, N, D) of a grid, by default one row per frame."""
    shape = grid or (len(frames), 1, frames.shape[1])
    return squeeze.choose(method, features=frames.flatten(0, 1), grid=shape, modality="video", **params)


# EVS


def test_evs_by_hand():
    """Changes .3 .1 and .3 .05: of three tokens two are the first frame, and of equal ones the earlier stays."""
    angles = torch.tensor([[0.0, 0.0], [0.7954, 0.4510], [1.5908, 0.7686]])
    frames = torch.stack([angles.cos(), angles.sin()], -1)
    assert clip("evs", frames, keep=3).kept.tolist() == [0, 1, 2]
    assert clip("evs", frames, keep=4).kept.tolist() == [0, 1, 2, 4]
    assert clip("evs", frames, keep=5).kept.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_evs_is_its_loop(seed):
    frames = noise(5, 12, 6, seed=seed)
    changes = [255.0] * 12
    for t in range(1, 5):
        changes += [1 - float(torch.cosine_similarity(frames[t, n], frames[t - 1, n], dim=0)) for n in range(12)]
    best = sorted(sorted(range(60), key=lambda i: -round(changes[i], 5))[:23])
    assert clip("evs", frames, (5, 3, 4), keep=23).kept.tolist() == best


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), torch.ones(2, 6, 3)]
)
def test_evs_keeps_its_budget_where_nothing_moves(frames):
    count = frames.shape[0] * frames.shape[1]
    for keep in (1, 5, count):
        kept = clip("evs", frames, keep=keep).kept
        assert len(kept) == keep
        assert kept.tolist()[: min(6, keep)] == list(range(min(6, keep)))


def test_evs_takes_a_batch_as_singles():
    frames = noise(2, 20, 6)
    both = squeeze.choose("evs", features=frames, grid=(5, 2, 2), modality="video", keep=9).kept
    for row in range(2):
        assert both[row].tolist() == clip("evs", frames[row].view(5, 4, 6), (5, 2, 2), keep=9).kept.tolist()


def test_evs_needs_frames():
    with pytest.raises(UnsupportedInputError, match="frames of one size"):
        squeeze.choose("evs", features=noise(20, 4), modality="video", keep=9)


# LLaVA-Scissor


def test_scissor_by_hand():
    """Tokens at 0, 10 and 20 degrees hang together by the middle one, which stands for them; the one at 90 is alone."""
    frame = circle(0, 10, 20, 90)[None]
    choice = clip("llava_scissor", frame, above=0.95)
    assert choice.kept.tolist() == [1, 3]
    assert choice.features.flatten().tolist() == pytest.approx([0.97483, 0.17189, 0.0, 1.0], abs=1e-4)
    assert clip("llava_scissor", frame, above=0.98).kept.tolist() == [1, 3]
    assert clip("llava_scissor", frame, above=0.99).kept.tolist() == [0, 1, 2, 3]


def components(x: torch.Tensor, above: float) -> list[tuple[int, list[int]]]:
    """Return (who stands for it, members) of each component, in the order of those that stand for them."""
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    links = [[j for j in range(len(x)) if i == j or float(unit[i] @ unit[j]) > above] for i in range(len(x))]
    left, found = set(range(len(x))), []
    while left:
        members, open_ = set(), [min(left)]
        while open_:
            token = open_.pop()
            if token not in members:
                members.add(token)
                open_ += links[token]
        left -= members
        found.append((min(members, key=lambda i: (-len(links[i]), i)), sorted(members)))
    return sorted(found)


def scissor(frames: torch.Tensor, above: float) -> tuple[list[int], torch.Tensor]:
    nodes, place = [], []
    for t, frame in enumerate(frames):
        for stands, members in components(frame, above):
            nodes.append(frame[members].mean(0))
            place.append(t * len(frame) + stands)
    found = components(torch.stack(nodes), above)
    means = torch.stack([torch.stack([nodes[n] for n in members]).mean(0) for _, members in found])
    x = frames.flatten(0, 1)
    into = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(means, dim=1).T).argmax(1)
    states = [(mean + x[into == n].sum(0)) / (1 + int((into == n).sum())) for n, mean in enumerate(means)]
    return [place[stands] for stands, _ in found], torch.stack(states)


def smooth(seed: int, frames: int = 4, count: int = 15) -> torch.Tensor:
    """Return frames (T, N, 4) whose tokens are near to a few directions."""
    kinds = noise(5, 4, seed=seed)
    which = torch.randint(0, 5, (frames, count), generator=torch.Generator().manual_seed(seed + 1))
    return kinds[which] + 0.3 * noise(frames, count, 4, seed=seed + 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("above", [0.8, 0.9, 0.97])
def test_scissor_is_its_loops(seed, above):
    frames = smooth(seed)
    choice = clip("llava_scissor", frames, above=above)
    place, states = scissor(frames, above)
    assert choice.kept.tolist() == place
    assert torch.allclose(choice.features, states, atol=1e-4)


def test_long_chains_hang_together():
    frame = circle(*(2.0 * n for n in range(80)))[None]
    choice = clip("llava_scissor", frame, above=0.999)
    assert choice.kept.tolist() == [1]
    assert torch.allclose(choice.features, frame[0].mean(0)[None], atol=1e-5)


@pytest.mark.parametrize("keep", [1, 2, 7, 30, 59, 60])
def test_scissor_keeps_a_budget_that_is_asked_for(keep):
    frames = smooth(3)
    choice = clip("llava_scissor", frames, keep=keep)
    assert len(choice.kept) == keep
    if keep == 60:
        assert torch.allclose(choice.features, frames.flatten(0, 1))


@pytest.mark.parametrize("frames", [torch.zeros(3, 6, 4), torch.ones(3, 6, 4), torch.ones(1, 6, 4)])
def test_scissor_of_a_still_video(frames):
    choice = clip("llava_scissor", frames)
    assert len(choice.kept) == (len(frames) * 6 if not frames.any() else 1)
    assert torch.isfinite(choice.features).all()


def test_scissor_takes_a_batch_as_singles():
    frames = torch.stack([smooth(1), smooth(2)])
    both = squeeze.choose("llava_scissor", features=frames.flatten(1, 2), grid=(4, 1, 15), modality="video")
    for row in range(2):
        one = clip("llava_scissor", frames[row])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)


# HoliTom


def test_runs_by_hand():
    """Places {0, 1} stand still from 0 to 1, {0, 2} from 1 to 2, {0} in all: ties keep the first two together."""
    calm = torch.tensor([[True, True, False], [True, False, True]])
    counts = ops.still_counts(calm)
    assert counts.tolist() == [[0, 2, 1], [0, 0, 2], [0, 0, 0]]
    assert ops.most_still(counts.tolist(), 1024) == ([(0, 1), (2, 2)], 2)
    assert ops.most_still(counts.tolist(), 1) == ([(0, 0), (1, 1), (2, 2)], 0)


@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_best_of_all(seed):
    """No other cut of the video saves more."""
    calm = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) > 0.3
    counts = ops.still_counts(calm).tolist()
    runs, saved = ops.most_still(counts, 1024)
    assert [frame for first, last in runs for frame in range(first, last + 1)] == list(range(7))
    most = 0
    for cuts in itertools.product((False, True), repeat=6):
        edges = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), 7]
        most = max(most, sum(counts[a][b - 1] * (b - 1 - a) for a, b in itertools.pairwise(edges)))
    assert saved == most == sum(counts[first][last] * (last - first) for first, last in runs)


def holitom(frames: torch.Tensor, seen: torch.Tensor, **params: Any) -> Any:
    return clip("holitom", frames, at="projector", signals={"encoder_attention": seen.flatten()}, **params)


def test_holitom_by_hand():
    """Runs (0, 1) and (2): one cluster of what stands still, one moving token per frame there, two in the last."""
    frames = torch.zeros(3, 3, 2)
    angles = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 90.0], [0.0, 90.0, 90.0]]).deg2rad()
    frames[..., 0], frames[..., 1] = angles.cos(), angles.sin()
    choice = holitom(frames, torch.tensor([[0.1, 0.2, 0.3]] * 3), retain=0.5)
    assert choice.kept.tolist() == [0, 2, 5, 7, 8]
    # The centre of two alike ones is the first of them; the states of what stands still are their mean.
    assert choice.features[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_holitom_averages_in_turn_by_hand():
    """4 with 8 is 6, and that with 0 is 3, where a plain mean would be 4."""
    assign = torch.tensor([[0, 0, 0, -1, 4]])
    weights = ops.running_mean_weights(assign)
    assert weights.tolist() == [[0.25, 0.25, 0.5, 0.0, 1.0]]
    assert ops.merge_tokens(torch.tensor([[[4.0], [8.0], [0.0], [9.0], [7.0]]]), assign, weights)[0, 0].item() == 3.0


def test_what_stands_still_goes_into_clusters():
    """Every token of a still place counts with its cluster's weight, shared over the frames of the run."""
    still, moving = noise(1, 12, 4, seed=3), noise(4, 4, 4, seed=4)
    frames = torch.cat([still.expand(4, -1, -1), moving], 1)
    choice = holitom(frames, noise(4, 16, seed=5).abs(), retain=0.25)
    clusters = [n for n in choice.kept.tolist() if n < 12]
    assert choice.kept.tolist()[: len(clusters)] == clusters
    into, weight = ops.cluster_weights(
        still, torch.ones(1, 12, dtype=torch.bool), torch.tensor([len(clusters)]), 7, 0.6
    )
    for row, centre in zip(choice.features, clusters, strict=False):
        mine = into[0] == centre
        assert torch.allclose(row, (weight[0, mine, None] * still[0, mine]).sum(0), atol=1e-5)
        assert float(weight[0, mine].sum()) == pytest.approx(1.0)
    others = [n for n in choice.kept.tolist() if n >= 16]
    assert all(n % 16 >= 12 for n in others)


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), noise(2, 6, 3), noise(5, 6, 3)]
)
def test_holitom_of_any_video(frames):
    for params in ({}, {"first": 0.5}, {"first": 0.9, "ratio": 0.9}):
        choice = holitom(frames, torch.ones(frames.shape[:2]), **params)
        assert len(choice.kept) >= 1
        assert torch.isfinite(choice.features).all()
    whole = holitom(frames, torch.ones(frames.shape[:2]), first=0.0, ratio=0.0)
    assert torch.equal(whole.features, frames.flatten(0, 1))


def test_holitom_takes_a_batch_as_singles():
    frames = torch.stack([smooth(1), smooth(2)])
    seen = noise(2, 60).abs()
    both = squeeze.choose(
        "holitom",
        at="projector",
        features=frames.flatten(1, 2),
        signals={"encoder_attention": seen},
        grid=(4, 1, 15),
        modality="video",
    )
    for row in range(2):
        one = holitom(frames[row], seen[row])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)


# FastVID


def test_segments_by_hand():
    """Of .95 .85 .97 one is cut as the least alike, and below the bar; the anchors stand in the last frame."""
    assert ops.alike_runs([0.95, 0.85, 0.97], 2, 0.9) == [(0, 1), (2, 3)]
    assert ops.alike_runs([0.95, 0.85, 0.97], 1, 0.9) == [(0, 1), (2, 3)]
    assert ops.alike_runs([0.95, 0.85, 0.97], 3, 0.0) == [(0, 0), (1, 1), (2, 3)]
    assert ops.alike_runs([], 8, 0.9) == [(0, 0)]
    assert ops.anchors_per_frame([(0, 1), (2, 3)], 2, 4) == [0, 4, 0, 4]
    assert ops.anchors_per_frame([(0, 5)], 3, 4) == [0, 9, 0, 0, 0, 9]


def fastvid(frames: torch.Tensor, seen: torch.Tensor, **params: Any) -> Any:
    return clip("fastvid", frames, signals={"encoder_attention": seen.flatten()}, **params)


def fastvid_by_loops(frames, seen, share, least, bar, part, period, own) -> tuple[list[int], dict[int, torch.Tensor]]:
    length, places, width = frames.shape
    means = torch.nn.functional.normalize(frames.mean(1), dim=1)
    runs = ops.alike_runs([float(means[t] @ means[t + 1]) for t in range(length - 1)], least, bar)
    each = int(places * share)
    context = int(each * part)
    kept, states, rest = [], {}, []
    for t in range(length):
        order = seen[t].argsort(descending=True, stable=True).tolist()
        kept += [t * places + n for n in order[: each - context]]
        rest.append(sorted(order[each - context :]))
    counts = ops.anchors_per_frame(runs, context, period)
    for first, last in runs:
        pool = [(t, n) for t in range(first, last + 1) for n in rest[t]]
        for t in range(first, last + 1):
            if not counts[t]:
                continue
            x = frames[t][rest[t]]
            far = torch.cdist(x, x) / width**0.5
            density = torch.exp(-far.sort(1).values[:, :4].square().mean(1))
            gap = torch.tensor(
                [
                    min((float(far[i, j]) for j in range(len(x)) if density[j] > density[i]), default=float(far.max()))
                    for i in range(len(x))
                ]
            )
            best = (density * gap).argsort(descending=True, stable=True)[: counts[t]].sort().values
            anchors = [rest[t][i] for i in best.tolist()]
            unit = torch.nn.functional.normalize(frames[t][anchors], dim=1)
            members: dict[int, list[Any]] = {n: [] for n in anchors}
            for u, n in pool:
                members[anchors[int((unit @ torch.nn.functional.normalize(frames[u, n], dim=0)).argmax())]].append(
                    (u, n)
                )
            for n, them in members.items():
                weight = max(1 / (len(them) + 1), own)
                mean = torch.stack([frames[u, m] for u, m in them]).mean(0)
                states[t * places + n] = weight * frames[t, n] + (1 - weight) * mean
    return sorted([*kept, *states]), states


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("params", [{}, {"retain": 0.5, "runs": 2, "unlike": 0.0, "period": 2, "own": 0.1}])
def test_fastvid_is_its_loops(seed, params):
    frames, seen = noise(9, 24, 6, seed=seed), noise(9, 24, seed=seed + 20).abs()
    given = {"retain": 0.25, "runs": 8, "unlike": 0.9, "context": 0.4, "period": 4, "own": 0.6} | params
    choice = fastvid(frames, seen, **given)
    kept, states = fastvid_by_loops(frames, seen, *given.values())
    assert choice.kept.tolist() == kept
    for row, token in zip(choice.features, kept, strict=True):
        assert torch.allclose(row, states.get(token, frames.flatten(0, 1)[token]), atol=1e-5)


def test_anchors_count_by_hand():
    """An anchor of 1 and another of 3: both go into it, .6 * 1 + .4 * 2 = 1.4."""
    from mllm_squeeze.reducers.dynamic_density import DynamicDensity

    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    into, source, weight = DynamicDensity()._into(x, torch.tensor([0]), torch.tensor([0, 1]))
    assert into.tolist() == [0, 0, 0] and source.tolist() == [0, 0, 1]
    assert (weight[:, None] * x[source]).sum(0).tolist() == pytest.approx([1.4, 1.4])


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), noise(2, 6, 3), noise(5, 6, 3)]
)
def test_fastvid_of_any_video(frames):
    seen = torch.ones(frames.shape[:2])
    for params in ({}, {"ratio": 0.5}, {"ratio": 0.95}, {"retain": 1.0}):
        choice = fastvid(frames, seen, **params)
        assert len(choice.kept) >= 1
        assert torch.isfinite(choice.features).all()
    assert torch.equal(fastvid(frames, seen, ratio=0.0).features, frames.flatten(0, 1))


def test_fastvid_takes_a_batch_as_singles():
    frames, seen = torch.stack([smooth(1), smooth(2)]), noise(2, 60).abs()
    signals = {"encoder_attention": seen}
    both = squeeze.choose("fastvid", features=frames.flatten(1, 2), signals=signals, grid=(4, 1, 15), modality="video")
    for row in range(2):
        one = fastvid(frames[row], seen[row])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)


# TimeChat-Online


def test_timechat_by_hand():
    """Likeness .9 .4 .5 and .3 .6 .51 to the frame before: above .5 one, then two leave; a third of a frame is one."""
    turns = torch.tensor([[0.0, 0, 0], [0.9, 0.4, 0.4999], [0.3, 0.6, 0.51]])
    angle = torch.cat([torch.zeros(1, 3), turns[1:].arccos()]).cumsum(0)
    frames = torch.stack([angle.cos(), angle.sin()], -1)
    assert clip("timechat_online", frames).kept.tolist() == [0, 1, 2, 4, 5, 6]
    assert clip("timechat_online", frames, alike=0.34, per_frame=True).kept.tolist() == [0, 1, 2, 4, 5, 6, 8]
    assert clip("timechat_online", frames, keep=4).kept.tolist() == [0, 1, 2, 6]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_frame", [False, True])
def test_timechat_is_its_loop(seed, per_frame):
    frames = noise(5, 12, 6, seed=seed)
    frames[2] = frames[1]
    kept = list(range(12))
    for t in range(1, 5):
        alike = torch.cosine_similarity(frames[t], frames[t - 1], dim=1)
        if per_frame:
            gone = set(alike.argsort(descending=True, stable=True)[: int(12 * 0.3)].tolist())
            # Of tokens that are all the same rounding says which is most alike.
            gone = set(range(3)) if t == 2 else gone
        else:
            gone = {n for n in range(12) if float(alike[n]) > 0.3}
        kept += [12 * t + n for n in range(12) if n not in gone]
    choice = clip("timechat_online", frames, (5, 3, 4), alike=0.3, per_frame=per_frame)
    if per_frame:
        assert len(choice.kept) == len(kept)
        kept, mine = ([n for n in found if not 24 <= n < 36] for found in (kept, choice.kept.tolist()))
        assert mine == kept
    else:
        assert choice.kept.tolist() == kept


@pytest.mark.parametrize("frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3)])
def test_timechat_of_a_still_video(frames):
    kept = clip("timechat_online", frames).kept.tolist()
    # Black has no direction, so nothing says that it is alike.
    assert kept == list(range(6 if frames.any() else len(frames) * 6))


# FlashVID


def flashvid(frames: torch.Tensor, seen: torch.Tensor, **params: Any) -> Any:
    return clip("flashvid", frames, at="projector", signals={"encoder_attention": seen.flatten()}, **params)


def test_trees_by_hand():
    """2, 4 and 6 in a row: 12 handed on to the first, over 2 is 6; a mean of them is 4."""
    place = torch.tensor([[-1, -1], [0, -1], [0, 1]])
    root, weight = ops.tree_weights(place, False)
    assert root.tolist() == [[0, 1], [0, 3], [0, 3]]
    x = torch.tensor([[2.0, 7.0], [4.0, 8.0], [6.0, 2.0]])
    sums = torch.zeros(6).index_add(0, root.flatten(), (weight * x).flatten())
    assert sums.tolist() == [6.0, 7.0, 0.0, 5.0, 0.0, 0.0]
    root, weight = ops.tree_weights(place, True)
    sums = torch.zeros(6).index_add(0, root.flatten(), (weight * x).flatten())
    assert sums.tolist() == pytest.approx([4.0, 7.0, 0.0, 5.0, 0.0, 0.0])


def test_flashvid_budget_by_hand():
    """196 tokens of a frame, a quarter, expanded: 62, of which 44 are picked; in runs of one frame exactly so many."""
    frames, seen = noise(8, 196, 6), noise(8, 196, seed=1).abs()
    choice = flashvid(frames, seen)
    assert len(choice.kept) == 62 * 8
    untouched = (choice.features[:, None] == frames.flatten(0, 1)[choice.kept][:, None]).all(-1).sum()
    assert untouched >= 44 * 8


def tree_loops(x: torch.Tensor, picked: list[set[int]], above: float, least: int, mean: str) -> list[dict[int, Any]]:
    """Return for each frame of a run the tokens that stay, beside those that are picked, and their states."""
    length, places, _ = x.shape
    likeness: dict[tuple[int, int], tuple[float, int]] = {}
    for t in range(1, length):
        for n in set(range(places)) - picked[t]:
            options = [p for p in range(places) if p not in picked[t - 1]]
            cosines = torch.cosine_similarity(x[t, n][None], x[t - 1][options])
            likeness[t, n] = float(cosines.max()), options[int(cosines.argmax())]
    values = sorted((value for value, _ in likeness.values()), reverse=True)
    bar = above
    if sum(value > above for value in values) > length * places - least:
        bar = values[length * places - least - 1]
    hung = {token: p for token, (value, p) in likeness.items() if value > bar}
    members: dict[tuple[int, int], list[Any]] = {}
    hanging: dict[tuple[int, int], int] = {}
    for t in range(length):
        for n in set(range(places)) - picked[t]:
            root = (t, n)
            if root in hung:
                before = (t - 1, hung[root])
                hanging[before] = hanging.get(before, 0) + 1
            while root in hung:
                root = (root[0] - 1, hung[root])
            members.setdefault(root, []).append(x[t, n])
    out: list[dict[int, Any]] = [{} for _ in range(length)]
    for (t, n), states in members.items():
        over = len(states) if mean == "tree" else 1 + hanging.get((t, n), 0)
        out[t][n] = torch.stack(states).sum(0) / over
    return out


def peaks_of(x: torch.Tensor, count: int, neighbours: int) -> list[int]:
    """Return the centres of density-peak clusters."""
    far = torch.cdist(x.double(), x.double()) / x.shape[1] ** 0.5
    density = (-far.sort(1).values[:, :neighbours].square().mean(1)).exp().tolist()
    worth = []
    for i in range(len(x)):
        denser = [j for j in range(len(x)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        worth.append(-density[i] * min((float(far[i, j]) for j in denser), default=float(far.max())))
    return sorted(range(len(x)), key=lambda i: (worth[i], i))[:count]


def clustered(states: dict[int, torch.Tensor], count: int, neighbours: int) -> dict[int, torch.Tensor]:
    """Return the centres of density-peak clusters, and the mean of each."""
    names = sorted(states)
    x = torch.stack([states[n] for n in names])
    centres = sorted(peaks_of(x, count, neighbours))
    far = torch.cdist(x.double(), x.double())
    into = [i if i in centres else min(centres, key=lambda c: (float(far[i, c]), c)) for i in range(len(x))]
    return {names[c]: x[[i for i in range(len(x)) if into[i] == c]].mean(0) for c in centres}


def picks_by_loop(x: torch.Tensor, worth: torch.Tensor, count: int, again: bool) -> set[int]:
    unit = torch.nn.functional.normalize(x, dim=1)
    far = (1 - unit @ unit.T).fill_diagonal_(0) * worth
    picks = [int(far.sort(0).values[1].argmax())]
    while len(picks) < count:
        least = far[picks].amin(0)
        if not again:
            least[picks] = -torch.inf
        picks.append(int(least.argmax()))
    return set(picks)


def flashvid_by_loops(frames, seen, each, best, runs, unlike, pick, again, hang, mean) -> dict[int, torch.Tensor]:
    length, places, _ = frames.shape
    means = torch.nn.functional.normalize(frames.mean(1), dim=1)
    rows = {}
    for first, last in ops.alike_runs([float(means[t] @ means[t + 1]) for t in range(length - 1)], runs, unlike):
        x, size = frames[first : last + 1], last - first + 1
        worth = seen[first : last + 1]
        if pick == "run":
            worth = worth * torch.stack([(x[t] @ x.mean(1).T).mean(1) for t in range(size)])
        picked = [picks_by_loop(x[t], worth[t], best, again) for t in range(size)]
        trees = tree_loops(x, picked, hang, each * size, mean)
        total = sum(len(states) for states in trees)
        for t, states in enumerate(trees):
            count = -int(-len(states) * (each - best) * size // total)
            found = clustered(states, count, min(count, 7)) if count else {}
            found |= {n: x[t, n] for n in picked[t]}
            rows |= {(first + t) * places + n: state for n, state in found.items()}
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("params", [{}, {"variant": "official", "pick": "seen", "hang": 0.3}, {"variant": "official"}])
def test_flashvid_is_its_loops(seed, params):
    frames = noise(1, 20, 6, seed=seed) + 0.6 * noise(6, 20, 6, seed=seed + 10)
    seen = noise(6, 20, seed=seed + 20).abs()
    choice = flashvid(frames, seen, runs=2, unlike=0.2, **params)
    official = "variant" in params
    mean, hang, pick = "handed" if official else "tree", params.get("hang", 0.8), params.get("pick", "run")
    rows = flashvid_by_loops(frames, seen, 7, 5, 2, 0.2, pick, official and pick == "run", hang, mean)
    assert choice.kept.tolist() == sorted(rows)
    assert torch.allclose(choice.features, torch.stack([rows[n] for n in sorted(rows)]), atol=1e-4)


def test_frames_that_repeat_become_one():
    """Whatever is not picked hangs on the first frame, and its mean is what it was."""
    frames = noise(1, 12, 6).expand(5, -1, -1)
    choice = flashvid(frames, torch.ones(5, 12), runs=1, retain=0.1)
    assert torch.allclose(choice.features[-1], frames[0, choice.kept[-1] % 12])
    long = flashvid(frames, torch.ones(5, 12), runs=1, retain=0.1, best=0.0, variant="official")
    mean = flashvid(frames, torch.ones(5, 12), runs=1, retain=0.1, best=0.0)
    assert float(long.features.norm()) > 2 * float(mean.features.norm())


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), noise(2, 6, 3), noise(5, 6, 3)]
)
@pytest.mark.parametrize("pick", ["run", "seen", "unlike", "score"])
def test_flashvid_of_any_video(frames, pick):
    seen = torch.ones(frames.shape[:2])
    for params in ({}, {"first": 0.5, "ratio": 0.9}, {"first": 0.95, "ratio": 0.97}, {"variant": "official"}):
        choice = flashvid(frames, seen, pick=pick, **params)
        assert len(frames) <= len(choice.kept)
        assert torch.isfinite(choice.features).all()
    assert len(flashvid(frames, seen, first=0.5, ratio=0.9, runs=5, pick=pick).kept) == 3 * len(frames)
    assert torch.equal(flashvid(frames, seen, first=0.0, ratio=0.0).features, frames.flatten(0, 1))


def test_flashvid_takes_a_batch_as_singles():
    frames, seen = torch.stack([smooth(1), smooth(2)]), noise(2, 60).abs()
    both = squeeze.choose(
        "flashvid",
        at="projector",
        features=frames.flatten(1, 2),
        signals={"encoder_attention": seen},
        grid=(4, 1, 15),
        modality="video",
    )
    for row in range(2):
        one = flashvid(frames[row], seen[row])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)


# PruneVid


def test_whole_runs_by_hand():
    """Labels 0 and 2 keep their longest run, 1 has none of two; frames 2 and 3 go to the longer side, 7 to the left."""
    assert ops.whole_runs([0, 0, 1, 0, 2, 2, 2, 1]) == [0, 0, 2, 2, 2, 2, 2, 2]
    assert ops.run_bounds([0, 0, 2, 2, 2, 2, 2, 2]) == [(0, 1), (2, 7)]
    assert ops.whole_runs([0, 0, 1, 2, 2]) == [0, 0, 0, 2, 2]
    assert ops.whole_runs([3, 1, 2]) == [0, 0, 0]
    assert ops.whole_runs([5, 1, 1]) == [1, 1, 1]
    assert ops.whole_runs([1, 1, 0, 1, 1]) == [1, 1, 1, 1, 1]
    assert ops.whole_runs([]) == []


def whole_runs_by_loops(labels: list[int]) -> list[int]:
    found: list[int | None] = list(labels)
    for label in set(labels):
        places = [n for n, other in enumerate(labels) if other == label]
        runs = [[places[0]]]
        for n in places[1:]:
            if n == runs[-1][-1] + 1:
                runs[-1].append(n)
            else:
                runs.append([n])
        longest = max(len(run) for run in runs)
        for run in runs:
            if len(run) < longest or longest == 1:
                for n in run:
                    found[n] = None
    while None in found:
        first = last = found.index(None)
        while last + 1 < len(found) and found[last + 1] is None:
            last += 1
        left = right = 0
        while first - left > 0 and found[first - left - 1] == found[first - 1]:
            left += 1
        while last + right + 1 < len(found) and found[last + right + 1] == found[last + 1]:
            right += 1
        label = found[last + 1] if right > left else found[first - 1] if left else 0
        found[first : last + 1] = [label] * (last - first + 1)
    return [label for label in found if label is not None]


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_whole_runs_are_their_loops(count):
    for labels in torch.randint(0, count, (40, 13), generator=torch.Generator().manual_seed(count)).tolist():
        assert ops.whole_runs(labels) == whole_runs_by_loops(labels)


def prunevid(frames: torch.Tensor, grid: Any = None, **params: Any) -> Any:
    return clip("prunevid", frames, grid, at="projector", **params)


def test_prunevid_by_hand():
    """Place 0 turns by 10 degrees and is averaged, place 1 by 90: three tokens of four."""
    frames = torch.stack([circle(0, 0), circle(10, 90)])
    choice = prunevid(frames)
    assert choice.kept.tolist() == [0, 1, 3]
    assert torch.allclose(choice.features, torch.stack([frames[:, 0].mean(0), frames[0, 1], frames[1, 1]]))


def prunevid_by_loops(frames, steady, pieces, clusters, few) -> dict[int, torch.Tensor]:
    length, places, _ = frames.shape
    means = frames.mean(1)
    number = max(1, int(length * pieces))
    centres = sorted(peaks_of(means, number, 7))
    far = torch.cdist(means.double(), means.double())
    labels = [t if t in centres else min(centres, key=lambda c: (float(far[t, c]), c)) for t in range(length)]
    rows = {}
    for first, last in ops.run_bounds(whole_runs_by_loops(labels)):
        x, size = frames[first : last + 1], last - first + 1
        pairs = list(itertools.permutations(range(size), 2))
        alike = [
            sum(float(torch.cosine_similarity(x[u, n], x[v, n], dim=0)) for u, v in pairs) / max(1, len(pairs))
            for n in range(places)
        ]
        still = [n for n in range(places) if size > 1 and alike[n] > steady]
        groups = [(first, {n: x[:, n].mean(0) for n in still})]
        groups += [(first + t, {n: x[t, n] for n in range(places) if n not in still}) for t in range(size)]
        for frame, states in groups:
            if len(states) > few:
                states = clustered(states, int(len(states) * clusters), 7)
            rows |= {frame * places + n: state for n, state in states.items()}
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("given", [{}, {"steady": 0.6, "pieces": 0.5, "clusters": 0.3}])
def test_prunevid_is_its_loops(seed, given):
    frames = noise(1, 24, 6, seed=seed) + 0.5 * noise(9, 24, 6, seed=seed + 10)
    choice = prunevid(frames, (9, 4, 6), **given)
    params = {"steady": 0.8, "pieces": 0.25, "clusters": 0.5} | given
    rows = prunevid_by_loops(frames, *params.values(), few=14)
    assert choice.kept.tolist() == sorted(rows)
    assert torch.allclose(choice.features, torch.stack([rows[n] for n in sorted(rows)]), atol=1e-5)


def test_frames_that_repeat_are_one_frame():
    choice = prunevid(noise(1, 12, 6).expand(8, -1, -1))
    assert choice.kept.tolist() == list(range(12))
    assert torch.allclose(choice.features, noise(1, 12, 6)[0], atol=1e-6)


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 20, 3), torch.ones(1, 6, 3), noise(1, 20, 3), noise(2, 15, 3)]
)
def test_prunevid_of_any_video(frames):
    count = frames.shape[0] * frames.shape[1]
    for params in ({}, {"first": 0.5, "ratio": 0.9}, {"first": 0.9, "ratio": 0.95}):
        choice = prunevid(frames, **params)
        assert 1 <= len(choice.kept) <= count
        assert torch.isfinite(choice.features).all()
    # Nothing is steady in black, or in a single frame.
    if len(frames) == 1 or not frames.any():
        assert len(prunevid(frames, first=0.5, ratio=0.9).kept) == count // 2
    assert torch.equal(prunevid(frames, first=0.0, ratio=0.0).features, frames.flatten(0, 1))


@pytest.mark.parametrize("keep", [9, 20, 33, 42, 50])
def test_prunevid_shares_what_is_asked_for(keep):
    """As many as asked for stay, but no more than there are when what is steady is averaged."""
    frames = noise(1, 12, 6) + 0.5 * noise(6, 12, 6, seed=1)
    assert len(prunevid(frames).kept) == 42
    assert len(prunevid(frames, first=1 - keep / 72, ratio=0.95).kept) == min(keep, 42)


def test_prunevid_takes_a_batch_as_singles():
    frames = torch.stack([smooth(1), smooth(2)])
    both = squeeze.choose("prunevid", at="projector", features=frames.flatten(1, 2), grid=(4, 1, 15), modality="video")
    for row in range(2):
        one = prunevid(frames[row])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)


def test_of_each_frame_a_fraction_stays():
    """int(3 * .4) is one, int(2 * .4) none; where all are none the largest frame keeps one; a budget is shared."""
    from mllm_squeeze.layout import Tile

    def kept(sizes: list[int], scores: list[float], **params: Any) -> list[int]:
        grid = [Tile(1, 1, size) for size in sizes]
        signals = {"attention": torch.tensor(scores)}
        return squeeze.choose("prunevid", at="layer 0.344", signals=signals, grid=grid, **params).kept.tolist()

    assert kept([3], [0.9, 0.1, 0.5]) == [0]
    assert kept([2, 3], [0.9, 0.8, 0.1, 0.5, 0.2]) == [3]
    assert kept([1, 2], [0.9, 0.1, 0.2]) == [2]
    assert kept([2, 4], [0.9, 0.8, 0.1, 0.5, 0.2, 0.3], ratio=0.5) == [0, 3, 5]


# DyToK


def test_a_budget_by_frames_by_hand():
    """Of 40 the first of four frames would get 20, and has room for 15: five go round, two of them a second time."""
    total, weights = torch.tensor([40]), torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    assert ops.dealt_out(total, weights, torch.full((1, 4), 15)).tolist() == [[15, 12, 8, 5]]
    assert ops.dealt_out(total, weights, torch.full((1, 4), 20)).tolist() == [[20, 10, 6, 4]]
    assert ops.dealt_out(total, weights, torch.full((1, 4), 9)).tolist() == [[9, 9, 9, 9]]
    assert ops.dealt_out(total, weights * 0, torch.full((1, 4), 15)).tolist() == [[10, 10, 10, 10]]


def dealt_by_loops(total: int, weights: list[float], limit: list[int]) -> list[int]:
    exact = [total * w / sum(weights) for w in weights]
    counts = [int(e + 1e-9) for e in exact]
    for n in sorted(range(len(weights)), key=lambda n: (counts[n] - exact[n], n))[: total - sum(counts)]:
        counts[n] += 1
    counts = [min(pair) for pair in zip(counts, limit, strict=True)]
    over = min(total, sum(limit)) - sum(counts)
    while over:
        for n in sorted(range(len(weights)), key=lambda n: (-weights[n], n)):
            if over and counts[n] < limit[n]:
                counts[n] += 1
                over -= 1
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_by_frames_is_its_loop(seed):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(6, 9, generator=draw) ** 4
    limit = torch.randint(0, 12, (6, 9), generator=draw)
    total = (limit.sum(1) * torch.rand(6, generator=draw)).long()
    total[0], total[1] = 0, limit[1].sum()
    dealt = ops.dealt_out(total, weights, limit)
    for row in range(6):
        assert dealt[row].tolist() == dealt_by_loops(int(total[row]), weights[row].tolist(), limit[row].tolist())


def test_shares_of_attention_by_hand():
    """Each head counts alike, whatever it gives to the span."""
    received = torch.tensor([[[0.1, 0.3, 7.0], [0.001, 0.001, 7.0], [0.0, 0.0, 7.0]]])
    shares = ops.attention_share(received, torch.tensor([[True, True, False]]))
    assert shares.tolist() == [pytest.approx([0.25, 1.25 / 3, 0.0])]


def dytok(frames: torch.Tensor, seen: torch.Tensor, given: list[torch.Tensor], **params: Any) -> Any:
    from mllm_squeeze.reducers.needs import Attention

    heads = {Attention(-n - 1, rows="last", heads="each"): row for n, row in enumerate(given)}
    signals = {"encoder_attention": seen.flatten(), "encoder_projection": frames.flatten(0, 1), **heads}
    return clip("dytok", frames, signals=signals, blocks=len(given), **params)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [None, 9])
def test_dytok_is_its_loops(seed, most):
    frames, seen = noise(6, 20, 5, seed=seed), noise(6, 20, seed=seed + 10).abs()
    given = [noise(3, 120, seed=seed + 20 + n).mul(2).exp() for n in range(2)]
    choice = dytok(frames, seen, given, keep=40, most=most)
    share = sum(row / row.sum(1, keepdim=True) for row in given).mean(0).view(6, 20).mean(1)
    counts = dealt_by_loops(40, share.tolist(), [most or 20] * 6)
    kept, states = [], []
    for t, count in enumerate(counts):
        best = seen[t].argsort(descending=True, stable=True)[: 6 * count // 7].tolist()
        rest = [n for n in range(20) if n not in best]
        few = count - len(best)
        targets = rest[:: max(1, len(rest) // few)][:few] if few else []
        members: dict[int, list[int]] = {n: [] for n in targets}
        for n in (n for n in rest if n not in targets and targets):
            members[max(targets, key=lambda m: float(torch.cosine_similarity(frames[t, n], frames[t, m], dim=0)))] += [
                n
            ]
        for n in sorted(best + targets):
            merged = frames[t, members[n]].mean(0) if members.get(n) else 0
            kept.append(20 * t + n)
            states.append(frames[t, n] + merged)
    assert choice.kept.tolist() == kept
    assert torch.allclose(choice.features, torch.stack(states), atol=1e-5)


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), noise(2, 6, 3), noise(5, 6, 3)]
)
@pytest.mark.parametrize("look", ["even", "one", "none"])
def test_dytok_keeps_its_budget(frames, look):
    number = frames.shape[0] * 6
    row = torch.zeros(2, number) if look == "none" else torch.ones(2, number)
    if look == "one":
        row[:, 1:] = 0
    for keep in (1, 5, number // 2, number):
        for most in (None, 1, 4):
            choice = dytok(frames, torch.ones(frames.shape[:2]), [row], keep=keep, most=most)
            assert len(choice.kept) == min(keep, number)
            assert torch.isfinite(choice.features).all()
    assert torch.equal(dytok(frames, torch.ones(frames.shape[:2]), [row], ratio=0.0).features, frames.flatten(0, 1))


def test_dytok_takes_a_batch_as_singles():
    """The second video has one frame less, and its words look elsewhere."""
    from mllm_squeeze.reducers.needs import Attention

    frames, seen, row = noise(2, 5, 12, 4), noise(2, 5, 12, seed=1).abs(), noise(2, 3, 60, seed=2).exp()
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, 48:] = False
    need = Attention(-1, rows="last", heads="each")
    both = squeeze.choose(
        "dytok",
        features=frames.flatten(1, 2),
        signals={need: row, "encoder_attention": seen.flatten(1), "encoder_projection": frames.flatten(1, 2)},
        mask=mask,
        grid=(5, 3, 4),
        modality="video",
        blocks=1,
        ratio=0.5,
    )
    for n, length in enumerate((5, 4)):
        one = dytok(frames[n, :length], seen[n, :length], [row[n, :, : 12 * length]], ratio=0.5)
        assert both.kept[n].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[n], one.features, atol=1e-5)


def test_any_rule_that_works_frame_by_frame_takes_such_a_budget():
    """Frames are worth .25, .98 and 1 of the word: .8, 3.1 and 3.1 of seven, whatever picks in them."""
    frames = torch.stack([circle(0, 10, 20, 30), circle(80, 80, 80, 80), circle(90, 90, 90, 90)])
    recipe = {
        "method": "asked",
        "steps": [
            {
                "at": "projector",
                "keep": 7,
                "segment": "frame",
                "budget": {"proportional": {"score": {"text_similarity": {"measure": "dot"}}}},
                "select": "farthest_point",
            }
        ],
    }
    kept = squeeze.choose(recipe, features=frames.flatten(0, 1), text=circle(90), grid=(3, 1, 4), modality="video").kept
    assert torch.bincount(kept // 4, minlength=3).tolist() == [1, 3, 3]


# All of them


@pytest.mark.parametrize("method", ["fastvid", "flashvid", "holitom", "prunevid"])
def test_a_frame_with_a_hole_is_refused(method):
    """No other token is taken for one that is hidden; frames that are hidden whole are no part of the video."""
    mask = torch.ones(2, 36, dtype=torch.bool)
    mask[0, 20] = False
    mask[1, 27:] = False
    frames, seen = noise(2, 36, 6), noise(2, 36).abs()
    signals = {} if method == "prunevid" else {"encoder_attention": seen}

    def run(rows: slice) -> Any:
        given = {name: value[rows] for name, value in signals.items()}
        return squeeze.choose(
            method,
            at="projector",
            features=frames[rows],
            signals=given,
            mask=mask[rows],
            grid=(4, 3, 3),
            modality="video",
        )

    with pytest.raises(UnsupportedInputError, match="1 of 36 places"):
        run(slice(2))
    first = {} if method == "prunevid" else {"signals": {"encoder_attention": seen[1, :27]}}
    one = clip(method, frames[1, :27].view(3, 9, 6), (3, 3, 3), at="projector", **first)
    assert run(slice(1, 2)).kept[0].tolist() == one.kept.tolist()
