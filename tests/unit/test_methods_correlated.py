"""FiCoCo-L and what it is made of: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.build import padded, ragged, visual_tokens
from torch import Tensor

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks
from mllm_squeeze.parts.merge.correlated import Correlated
from mllm_squeeze.parts.score.redundancy import ASKED, ASKING, KEY, QUERY, Redundancy
from mllm_squeeze.recipe.recipe import load_recipe, resolve_steps


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signals(number: int, words: int, seed: int = 0, heads: int = 4, kv: int = 2, dim: int = 6) -> dict[Any, Tensor]:
    return {
        QUERY: noise(number, heads, dim, seed=seed),
        KEY: noise(number, kv, dim, seed=seed + 1),
        ASKING: noise(words, heads, dim, seed=seed + 2),
        ASKED: noise(words, kv, dim, seed=seed + 3),
    }


def maps(given: dict[Any, Tensor], of: str) -> tuple[Tensor, Tensor, Tensor]:
    """What visual tokens give each other, what they give the words, and what those give them, in float64."""
    query = torch.cat([given[QUERY], given[ASKING]]).double()
    key = torch.cat([given[KEY], given[ASKED]]).double()
    group = query.shape[1] // key.shape[1]
    each = []
    for head in range(query.shape[1]):
        logits = query[:, head] @ key[:, head // group].T / math.sqrt(query.shape[2])
        each.append(logits.softmax(1) if of == "attention" else logits)
    whole, number = sum(each) / len(each), len(given[QUERY])
    return whole[:number, :number], whole[:number, number:], whole[number:, :number]


def by_loops(
    given: dict[Any, Tensor], x: Tensor, keep: int, of: str, quantile: float, share: float = 0.6
) -> tuple[list[int], Tensor]:
    """The survivors and what becomes of them."""
    own, asked, asking = maps(given, of)
    number, words, soft = len(own), asked.shape[1], of == "attention"
    score = []
    for i in range(number):
        given_visual = sum(float(own[i, j]) for j in range(number)) / (number if soft else 1)
        score.append(share * given_visual - (1 - share) * sum(float(asked[i, k]) for k in range(words)) / max(1, words))
    if not soft:
        score[0] = -math.inf
    leaving = sorted(range(number), key=lambda i: (-score[i], -i))[: number - keep]
    kept = [i for i in range(number) if i not in leaving]
    total, weight = {j: x[j].double() for j in kept}, dict.fromkeys(kept, 1.0)
    for i in leaving:
        row = {}
        for j in kept if soft else range(number):
            by_words = sum(float(asked[i, k]) * float(asking[k, j]) for k in range(words))
            row[j] = share * float(own[i, j]) + (1 - share) * by_words / (max(1, words) if soft else 1)
        if not soft:
            row[i] = -math.inf
        values = sorted(row.values())
        # The paper takes what is at the quantile or above; the code what is above, which interpolates.
        place = quantile * (len(values) - 1)
        below = values[math.ceil(round(place, 9))] if soft else values[math.floor(round(place, 9))]
        goes = [j for j, value in row.items() if value >= below] if soft else [j for j in row if row[j] > below]
        goes = goes or [max(row, key=lambda j: (row[j], -j))]
        parts = {j: row[j] if soft else math.exp(row[j]) for j in goes}
        for j in goes:
            part = parts[j] / sum(parts.values())
            if j in total:
                total[j] = total[j] + part * x[i].double()
                weight[j] += part
    return kept, torch.stack([total[j] / (weight[j] if soft else 1) for j in kept])


def ficoco(x: Tensor, given: dict[Any, Tensor], **params: Any) -> Any:
    return squeeze.choose("ficoco_l", features=x, signals=given, stage=25, **params)


@pytest.mark.parametrize(("variant", "of"), [("paper", "attention"), ("official", "logits")])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.83, 0.998, 1.0])
@pytest.mark.parametrize("keep", [1, 2, 9, 16, 17])
def test_it_is_its_loops(variant, of, quantile, keep):
    x, given = noise(17, 5, seed=9), signals(17, 4)
    choice = ficoco(x, given, keep=keep, variant=variant, quantile=quantile)
    kept, states = by_loops(given, x, keep, of, quantile)
    assert choice.kept.tolist() == kept
    assert torch.allclose(choice.features.double(), states, atol=1e-5)


def test_logits_are_the_mean_over_heads_that_share_keys():
    given = signals(7, 3)
    found = ops.head_mean_logits(given[QUERY][None], given[KEY][None])
    assert torch.allclose(found[0].double(), maps(given, "logits")[0], atol=1e-5)


def test_open_attention_looks_at_later_tokens_and_not_at_padding():
    query, key = noise(2, 5, 4, 6), noise(2, 6, 2, 6, seed=1)
    mask = ragged(6, 4)
    hidden = key.masked_fill(~mask[..., None, None], float("nan"))
    found = ops.open_attention(query, hidden, mask)
    logits = torch.einsum("sahd,sbhd->shab", query, key.repeat_interleave(2, 2)) / 6**0.5
    wanted = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).mean(1)
    assert torch.allclose(found, wanted, atol=1e-6) and not found[1, :, 4:].any()


def test_redundancy_by_hand():
    """.6 * (.2 + .4) / 2 - .4 * (.1 + .5) / 2 = .06, and with the sum .24."""
    own, asked = torch.tensor([[[0.2, 0.4, 9.0]] * 3]), torch.tensor([[[0.1, 0.5, 9.0]] * 3])
    mask, words = ragged(2)[:, [0, 1, 1]] & torch.tensor([[True, True, False]]), torch.tensor([[True, True, False]])
    for mean, wanted in ((True, 0.06), (False, 0.24)):
        found = ops.redundancy(own, asked, mask, words, 0.6, mean)
        assert found[0, :2].tolist() == pytest.approx([wanted] * 2)
    nothing = ops.redundancy(own, asked, mask, words & False, 0.6, True)
    assert nothing[0, 0].item() == pytest.approx(0.18)


def test_correlation_by_hand():
    """.5 * 1 + .5 * (2 * 3 + 4 * 5) / 2 = 7; the third word is padding."""
    to_words, from_words = torch.tensor([[[2.0, 4.0, float("nan")]]]), torch.tensor([[[3.0], [5.0], [float("nan")]]])
    words = torch.tensor([[True, True, False]])
    direct = torch.ones(1, 1, 1)
    assert ops.correlation(direct, to_words, from_words, words, 0.5, True).item() == 7
    assert ops.correlation(direct, to_words, from_words, words, 0.5, False).item() == 13.5


@pytest.mark.parametrize(("number", "wanted"), [(2, [1.375, 19 / 7, 4]), (1, [1.5, 3, 4])])
def test_the_worked_example_of_the_papers_compression(number, wanted):
    """Token 1 goes to 0 and 2 with .6 and .4, or to 0 alone."""
    alike, x = torch.tensor([[[0.3, 0.3, 0.2, 0.1]]]), torch.tensor([[[1.0], [2], [3], [4]]])
    keep = torch.tensor([[True, False, True, True]])
    found = ops.entries_to_correlated(
        alike, torch.tensor([[1]]), torch.tensor([[True]]), keep, keep, torch.tensor([number]), 2, True
    )
    assert ops.mix_tokens(x, *found)[0, [0, 2, 3], 0].tolist() == pytest.approx(wanted)
    assert ops.strongest_target(keep, *found)[0].tolist() == [0, 0, 2, 3]


def test_ties_take_the_first_and_what_goes_to_one_that_leaves_is_lost():
    keep, everyone = torch.tensor([[False, True, True, False]]), torch.ones(1, 4, dtype=torch.bool)
    alike = torch.tensor([[[9.0, 1, 1, 0], [2, 1, 1, 9]]])
    leaving, both = torch.tensor([[0, 3]]), torch.ones(1, 2, dtype=torch.bool)
    x = torch.tensor([[[10.0], [1], [2], [100]]])
    found = ops.entries_to_correlated(alike, leaving, both, keep, everyone, torch.tensor([1]), 1, False)
    # 0 goes to 1, the first of two; 3 would go to 0, which leaves.
    assert ops.mix_tokens(x, *found)[0, [1, 2], 0].tolist() == [11, 2]
    assert ops.strongest_target(keep, *found)[0].tolist() == [1, 1, 2, -1]


@pytest.mark.parametrize("of", ["attention", "logits"])
def test_a_padded_batch_is_its_singles(of):
    """Spans of other lengths, numbers of words and budgets."""
    numbers, words, budgets = [12, 5, 7], [4, 1, 6], [7, 4, 7]
    given = [signals(n, w, seed=10 * n) for n, w in zip(numbers, words, strict=True)]
    xs = [noise(n, 5, seed=n) for n in numbers]

    def run(rows: list[int], width: int | None) -> tuple[Tensor, Tensor]:
        tokens = visual_tokens(
            [xs[row] for row in rows],
            [budgets[row] for row in rows],
            signals={need: [given[row][need] for row in rows] for need in (QUERY, KEY)},
            text={need: [given[row][need] for row in rows] for need in (ASKED, ASKING)},
            width=width,
        )
        groups = Groups(tokens.mask.long() - 1, 1)
        score = Redundancy(of=of).score(tokens, groups)
        keep = ops.top_k_mask(score, tokens.mask, tokens.budget)
        made = Correlated(of=of, quantile=0.6).merge(tokens, groups, Picks(keep.long() - 1), score)
        return keep, made.states(padded([xs[row] for row in rows], width).nan_to_num())

    keep, states = run([0, 1, 2], 15)
    for row, number in enumerate(numbers):
        alone, own = run([row], None)
        assert torch.equal(keep[row, :number], alone[0]) and not keep[row, number:].any()
        assert torch.allclose(states[row, :number][alone[0]], own[0][alone[0]], atol=1e-6)


def test_the_first_token_stays_where_it_is_said():
    given = signals(9, 3)
    given[QUERY][0] = 20 * given[KEY].sum(0).repeat_interleave(2, 0)
    x = noise(9, 5)
    assert 0 in ficoco(x, given, keep=1, variant="official").kept.tolist()
    tokens = visual_tokens([x], [1], signals={QUERY: [given[QUERY]], KEY: [given[KEY]]}, text={ASKED: [given[ASKED]]})
    free = Redundancy(of="logits").score(tokens, Groups(tokens.mask.long() - 1, 1))
    assert int(free[0].argmin()) == 0


def test_a_prompt_without_words_counts_what_tokens_give_each_other():
    x, given = noise(9, 5), signals(9, 3)
    tokens = visual_tokens([x], [4], signals={QUERY: [given[QUERY]], KEY: [given[KEY]]}, text={ASKED: [given[ASKED]]})
    tokens.words[:] = False
    score = Redundancy().score(tokens, Groups(tokens.mask.long() - 1, 1))
    assert torch.allclose(score, torch.full_like(score, -0.6 / 9), atol=1e-6), "each row sums to 1"


def test_the_schedule_is_the_papers():
    """14 of 576 in each of 26 cuts of 32 layers; of 28 layers as many in all."""
    recipe = load_recipe("ficoco_l")
    step = recipe.steps[0]
    left = [step.amount.of_prompt([576], stage, 26)[0] for stage in range(26)]
    assert left == [576 - 14 * (n + 1) for n in range(26)]
    assert resolve_steps(recipe, 32) == (tuple(range(6, 32)),)
    (fewer,) = resolve_steps(recipe, 28)
    assert len(fewer) == 26 and fewer[0] == 5 and fewer[-1] == 27 and len(set(fewer)) == 23
