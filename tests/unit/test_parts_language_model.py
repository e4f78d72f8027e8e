"""Parts that read the language model, against their literal references; batches, padding and ties."""

from __future__ import annotations

import math

import pytest
import torch
from reference import language_model as literal
from reference.build import visual_tokens

from mllm_squeeze import ops
from mllm_squeeze.reducers.needs import Features, States
from mllm_squeeze.registry import build_part

LENGTHS = [7, 12, 1, 9]
WIDTH = 15
WHOLE = build_part("segment", "whole")


def made(signals=None, seed=0, budgets=None, text=None):
    """Tokens of some lengths, NaN at padding; signals: (N, ...) tensors of each span by need, or a shape."""
    torch.manual_seed(seed)
    features = [torch.randn(n, 6) for n in LENGTHS]
    tokens = visual_tokens(
        features, budgets or [max(1, n // 2) for n in LENGTHS], signals=signals, text=text, width=WIDTH
    )
    return tokens, WHOLE.segment(tokens)


def rows_of(lengths=LENGTHS, heads=2, words=4, seed=3):
    """Attention of the words onto the tokens, (S, H, T, N), NaN at padding."""
    torch.manual_seed(seed)
    out = torch.full((len(lengths), heads, words, WIDTH), math.nan)
    for i, n in enumerate(lengths):
        out[i, ..., :n] = torch.rand(heads, words, n)
    return out


def scored(part, tokens, groups, row):
    return part.score(tokens, groups)[row][tokens.mask[row]]


def close(found, expected):
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)


def test_change_is_what_a_block_adds():
    before = [torch.randn(n, 6) for n in LENGTHS]
    tokens, groups = made({States("in"): before})
    part = build_part("score", "change")
    assert part.needs() == (Features(), States("in"))
    for row, n in enumerate(LENGTHS):
        x = tokens.features[row, :n].tolist()
        close(
            scored(part, tokens, groups, row), [math.dist(a, b) for a, b in zip(x, before[row].tolist(), strict=True)]
        )
    assert build_part("score", {"change": "mlp"}).needs() == (States("mlp_out"),)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_change_of_half_a_block(half):
    added = [torch.randn(n, 6) for n in LENGTHS]
    tokens, groups = made({States(f"{half}_out"): added})
    part = build_part("score", {"change": {"by": half, "sign": -1}})
    for row in range(4):
        close(scored(part, tokens, groups, row), [-math.hypot(*x) for x in added[row].tolist()])


def contrasted(rows, asking, heads):
    """The tokens with all signals that a contrast reads."""
    tokens, groups = made()
    part = build_part("score", {"prior_contrast": {"rows": asking, "heads": heads}})
    for need in part.needs():
        x = rows[:, :, -1:] if need.rows == "last" else rows
        x = {"each": lambda x: x, "mean": lambda x: x.mean(1), "max": lambda x: x.amax(1)}[need.heads](x)
        tokens.signals[need] = x.squeeze(-2) if need.rows == "last" else x if need.over_rows == "each" else x.sum(-2)
    return part, tokens, groups


@pytest.mark.parametrize("asking", ["last", "text", "question"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_contrast_with_the_prior(asking, heads):
    rows = rows_of()
    # An earlier word does not see the later picture, so it is not the prior.
    rows[1, :, 0, :12] = 0
    part, tokens, groups = contrasted(rows, asking, heads)
    join = max if heads == "max" else lambda x: math.fsum(x) / len(x)
    for row, n in enumerate(LENGTHS):
        seen = rows[row, ..., :n].tolist()
        asked = {"last": seen[0][-1:], "text": seen[0], "question": seen[0][:-1]}[asking]
        words = range(len(seen[0]))[-1:] if asking == "last" else range(len(asked))
        p = [join([math.fsum(head[t][i] for t in words) / len(words) for head in seen]) for i in range(n)]
        q = [join([head[1 if row == 1 else 0][i] for head in seen]) for i in range(n)]
        close(scored(part, tokens, groups, row), literal.beyond_prior(p, q))


@pytest.mark.parametrize("asking", ["last", "text", "question"])
def test_without_a_prior_attention_counts(asking):
    rows = rows_of(words=1)
    part, tokens, groups = contrasted(rows, asking, "mean")
    for row, n in enumerate(LENGTHS):
        p = rows[row, :, 0, :n].mean(0)
        close(scored(part, tokens, groups, row), (p / p.sum()).tolist())


def test_the_contrast_of_the_specification():
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = ops.beyond_prior(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[0.6, 0.1, 0.1, 0.2]]), mask)
    close(found[0], [-0.162186, 0.329584, 0.138629, -0.069315])


def test_part_in_the_spectrum():
    tokens, groups = made()
    part = build_part("score", "spectrum")
    for row, n in enumerate(LENGTHS):
        u, s, _ = torch.linalg.svd(tokens.features[row, :n].double(), full_matrices=False)
        close(scored(part, tokens, groups, row), (u.abs() @ s).tolist())
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [3.0, 0.5], [0.1, 0.1]]])
    found = ops.spectral_weight(x, torch.ones(1, 4, dtype=torch.bool))[0]
    torch.testing.assert_close(found, torch.tensor([3.2553, 1.0851, 3.2634, 0.1992]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_the_best_take_in_the_second_best(share):
    score = torch.rand(4, WIDTH).masked_fill(torch.arange(WIDTH) >= torch.tensor(LENGTHS)[:, None], math.nan)
    tokens, groups = made(seed=5)
    limit = (torch.tensor(LENGTHS) * share).ceil().long()[:, None]
    found = build_part("merge", "into_best").pick_and_merge(tokens, groups, score, limit)
    for row, n in enumerate(LENGTHS):
        kept, into = literal.merged_into_best(
            tokens.features[row, :n].tolist(), score[row, :n].tolist(), int(limit[row])
        )
        assert found.keep[row].nonzero().flatten().tolist() == kept
        assert len(kept) == limit[row]
        expected = {**{i: i for i in kept}, **into}
        assert {i: a for i, a in enumerate(found.assign[row].tolist()) if a >= 0} == expected


def test_the_carving_of_the_specification():
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [3.0, 0.5], [0.1, 0.1]]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    keep, assign = ops.merged_into_best(x, torch.tensor([[2.0, 3.0, 3.0, 2.0]]), mask, torch.tensor([2]))
    assert keep.tolist() == [[True, True, False, False]]
    assert assign.tolist() == [[0, 1, 1, -1]]
