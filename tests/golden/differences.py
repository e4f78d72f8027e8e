"""What the library does otherwise than the authors' code, with its reason: as a transformation of what is expected.

Every entry is named under "Differs from the authors' code" of the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from golden.case import Case
from golden.read_attention import pyramiddrop_row
from golden.read_clips import FLASHVID_PICKS, in_pieces
from mllm_squeeze import ops
from mllm_squeeze.ops import kept_count
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.frame_trees import FrameTrees, _Run


@dataclass(frozen=True)
class Difference:
    """One declared difference.

    reason: why, as the docs say it. expected: the case with what the library is expected to make of it.
    """

    reason: str
    expected: Callable[[Case], Case]


def recounted(expected: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return what was kept (n,), and as many more or fewer by score (N,) as make up the count."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[expected] = True
    first = (scores.double() + kept * scores.abs().max() * 4).argsort(descending=True, stable=True)
    return first[:count].sort().values


def _fastv(case: Case) -> Case:
    scores = case["attention_last_row"].mean(0)
    count = kept_count(len(scores), ratio=case["ratio_removed"])
    return case.with_expected(keep=recounted(case["keep"], scores, count))


def _pyramiddrop(case: Case) -> Case:
    kept = {}
    for stage, ratio in enumerate(case["ratios"].tolist()):
        name, row = f"s{stage}_keep", pyramiddrop_row(case, stage)
        kept[name] = recounted(case[name], row, min(kept_count(case["visual"], keep=ratio), len(row)))
    return case.with_expected(**kept)


def _priortr(case: Case) -> Case:
    if case.get("keep_tokens", 0) > 0 or "keep_ratio" not in case:
        return case
    count = kept_count(len(case["scores"]), keep=case["keep_ratio"])
    return case.with_expected(keep=recounted(case["keep"], case["scores"], count))


def _v2drop(case: Case) -> Case:
    kept = {}
    layers = sorted(int(name[1:].split("_")[0]) for name in case if name.endswith("_keep"))
    for layer, fraction in zip(layers, load_recipe("v2drop").params["kept"], strict=True):
        name, change = f"l{layer}_keep", case[f"l{layer}_change"]
        kept[name] = recounted(case[name], change, min(kept_count(case["n_visual"], keep=fraction), len(change)))
    return case.with_expected(**kept)


def _hiprune(case: Case) -> Case:
    if "kept_count" in case:
        return case
    count = round(case["ratio_kept"] * len(case["deep_received"]))
    return case.with_expected(keep=recounted(case["keep"], case["deep_received"], count))


def _vscan(case: Case) -> Case:
    """Return a case with the budget kept to the token: what windows leave of the local scan goes to others."""
    number = len(case["features"]) // int(case.get("window", 1)) ** 2
    if case["kind"] == "qwen" or case["kept_count"] // 2 % number == 0:
        return case
    count, local = case["kept_count"], case["local"].long()
    height, width = case["grid"].tolist()
    cell = torch.arange(height * width)
    window = (cell // width // case["window"]) * (width // case["window"]) + cell % width // case["window"]
    more = case["shallow_cls"].clone()
    more[local] = -torch.inf
    # At most one more of each window.
    best = torch.stack([torch.where(window == n, more, -torch.inf).argmax() for n in range(number)])
    local = torch.cat([local, best[more[best].argsort(descending=True)[: count // 2 - len(local)]]])
    deep = case["deep_cls"].clone()
    deep[local] = -torch.inf
    keep = torch.cat([local, deep.argsort(descending=True, stable=True)[: count - len(local)]]).sort().values
    unit = torch.nn.functional.normalize(case["features"], dim=1)
    into = (unit @ unit[keep].T).argmax(1)
    into[keep] = torch.arange(len(keep))
    sums = torch.zeros(len(keep), unit.shape[1]).index_add_(0, into, case["features"])
    return case.with_expected(keep=keep, local=local.sort().values, merged=sums / torch.bincount(into)[:, None])


def _btp(case: Case) -> Case:
    """Return a case in which what several pick counts once: the rest is filled up by the farthest tokens."""
    filled = {}
    for name in [name for name in case if name.endswith("_keep") and name.replace("keep", "features") in case]:
        unit = torch.nn.functional.normalize(case[name.replace("keep", "features")], dim=1)
        keep = case[name].unique().tolist()
        while len(keep) < len(case[name]):
            far = (1 - unit @ unit[keep].T).amin(1)
            far[keep] = -1
            keep.append(int(far.argmax()))
        filled[name] = torch.tensor(sorted(keep))
    return case.with_expected(**filled)


def _nuwa(case: Case) -> Case:
    """Return a case with the budget kept where the code would need four tokens of a cell, and keeps all instead."""
    number, count = len(case["features"]), case["n"]
    if count <= case["top_n"] * number / 4 or math.ceil(4 * count / number) < 4:
        return case
    score = case["attention"]
    keep = score.argsort(descending=True, stable=True)[:count].sort().values
    unit = torch.nn.functional.normalize(case["sim_features"], dim=1)
    place = torch.cartesian_prod(*(torch.arange(side) for side in case["grid"].tolist())).float()
    near = 1 - torch.cdist(place[keep], place) / math.sqrt(case["distance_sq"])
    weight = (unit[keep] @ unit.T).clamp(min=0) * near.clamp(min=0)
    weight = weight / (weight.sum(1, keepdim=True) + 1e-8)
    weight[torch.arange(count), keep] = 1
    strong = score[keep] >= torch.quantile(score[keep], case["quantile"])
    tokens = torch.where(strong[:, None], case["features"][keep], weight @ case["features"])
    return case.with_expected(keep=keep, tokens=tokens)


def _recoverable(case: Case) -> Case:
    """Return a case with the keys of the rest's own: in the code its places count from the first of all keys."""
    centres = case["centres_order"].tolist()
    if not centres:
        return case
    x, weight, said = case["features"], case["cls_attention"], case["text_similarity"].clone()
    seen = weight.argsort(descending=True, stable=True)[: case["n_visual"]]
    said[seen] = said.min()
    unit = torch.nn.functional.normalize(case["keys"], dim=1)
    rest = sorted(set(range(len(x))) - set(case["keep"].tolist()))
    merged = [x[case["keep"]]]
    for centre in centres:
        others = [token for token in rest if token != centre]
        alike = unit[others] @ unit[centre] + 50 * said[others]
        near = torch.tensor(others)[alike.argsort(descending=True, stable=True)[:32]]
        merged.append((x[centre] + (weight[near, None] * x[near]).sum(0))[None])
    left = torch.tensor([token for token in rest if token not in centres])
    merged.append((weight[left, None] * x[left]).sum(0, keepdim=True))
    return case.with_expected(merged=torch.cat(merged))


def _transprune(case: Case) -> Case:
    """Return a case with counts rounded half up: the scores are sums of shares, of changes and of attention."""
    kept, changes = {}, []
    left = torch.arange(case["visual"])
    for stage, fraction in enumerate(case["ratios"].tolist()):
        layers = [n for n in range(99) if f"s{stage}_l{n}_ttv" in case]
        visual = slice(case["v0"], case["v0"] + len(left))
        changes += [case[f"s{stage}_l{n}_ttv"][visual] for n in layers]
        change, seen = sum(changes), case[f"s{stage}_text_attention"]
        score = change / (change.sum() + 1e-8) + seen / (seen.sum() + 1e-8)
        name, count = f"s{stage}_keep", min(kept_count(case["visual"], keep=fraction), len(score))
        kept[name] = recounted(case[name], score, count)
        changes = [change[case[name]] for change in changes]
        left = left[case[name]]
    return case.with_expected(**kept)


def _vflowopt(case: Case) -> Case:
    if case["kind"] != "importance":
        return case
    return case.with_expected(importance=case["importance"] - case["entropy_weight"] * case["entropy"].softmax(0))


def _flashvid(case: Case) -> Case:
    """Return a case in which what is picked stands for itself only, and of equal densities the first is denser.

    What the code picks twice counts once. Densities of nearest neighbours are equal where they look at no more than
    two; frames of more clusters, in runs of several frames, stay as they are.
    """
    x, seen, number = case["features"], case["attention"], case["adts_per_frame"]
    places, others = x.shape[1], case["sttm_per_frame"]
    rows = dict(zip(case["keep"].tolist(), case["merged"], strict=True))
    rule = FrameTrees(pick=FLASHVID_PICKS[case["selection"][0]], again=True)
    first = 0
    for length in case["segment_lengths"].tolist():
        run = x[first : first + length]
        picked = rule._picked(_Run(run, seen[first : first + length]), number)
        hung = ops.hung_on_frame_before(run, ~picked, case["temporal_threshold"], (number + others) * length)
        stays = ~picked & (hung < 0)
        root, weight = ops.tree_weights(hung, False)
        trees = torch.zeros_like(run).flatten(0, 1)
        trees.index_add_(0, root.flatten(), (run * weight[..., None]).flatten(0, 1))
        for frame, left in enumerate(stays):
            count = math.ceil(int(left.sum()) * (others * length / int(stays.sum())))
            if count > 2 and length > 1:
                continue
            start = (first + frame) * places
            for n in range(start, start + places):
                rows.pop(n, None)
            rows.update({start + n: run[frame, n] for n in picked[frame].nonzero().flatten().tolist()})
            rows.update({start + n: row for n, row in _clusters(trees.view(run.shape)[frame], left, count)})
        first += length
    keep = sorted(rows)
    return case.with_expected(keep=torch.tensor(keep), merged=torch.stack([rows[n] for n in keep]))


def _prunevid(case: Case) -> Case:
    if "features" not in case:
        return case
    sizes = case["static_sizes"] + case["dynamic_sizes"]
    return case.with_expected(merged=in_pieces(case["merged"], sizes.tolist()))


def _clusters(x: Tensor, left: Tensor, number: int) -> list[tuple[int, Tensor]]:
    """Return centre and mean of the density-peak clusters of the tokens of a frame that are left."""
    if not number:
        return []
    into = ops.density_peaks(x[None], left[None], torch.tensor([number]), min(number, 7))[0]
    return [(n, x[into == n].mean(0)) for n in into[left].unique().tolist()]


DIFFERENCES = {
    "btp": Difference("a token that several pick counts once, where the code's second cut keeps it twice", _btp),
    "fastv": Difference("kept counts round half up instead of half to even", _fastv),
    "flashvid": Difference(
        "a picked token stands for itself only, where the code also clusters it in single frames, and of equal "
        "densities the first is denser",
        _flashvid,
    ),
    "hiprune": Difference("on Qwen2.5-VL the code picks anchors and neighbours twice, and loses as many", _hiprune),
    "mob": Difference(
        "a token is picked once only, where the code may pick copies of a picked one again",
        lambda case: case.with_expected(keep=case["keep"].unique()),
    ),
    "nuwa": Difference("the budget is kept where a cell would have to give all its four tokens", _nuwa),
    "priortr": Difference("a ratio is turned into a count by rounding half up instead of down", _priortr),
    "prunevid": Difference("tokens stay in raster order, where clusters follow their density in the code", _prunevid),
    "pyramiddrop": Difference("the count of a stage is rounded half up, where the code truncates it", _pyramiddrop),
    "recoverable-compression": Difference("the rest is compared by its own keys, not by those of others", _recoverable),
    "transprune": Difference("the count of a stage is rounded half up, where the code truncates it", _transprune),
    "vflowopt": Difference("the entropy of pixels is left out", _vflowopt),
    "vscan": Difference("the budget is kept to the token, where the code loses what no window gets", _vscan),
    "v2drop": Difference("the count of a cut is rounded half up, from the original number of tokens", _v2drop),
}
