"""FastV, PyramidDrop, SparseVLM and VisionZip: worked examples of the specs and literal rules."""

from __future__ import annotations

import pytest
import torch
from reference import rules
from reference.build import chosen, visual_tokens
from reference.methods import attention_rank, dominant_contextual

from mllm_squeeze import ops
from mllm_squeeze.reducers.needs import Attention, EncoderAttention, EncoderProjection, Features
from mllm_squeeze.reducers.text_rank_recycle import TextRankRecycle

INF = float("inf")


def with_scores(*rows, budgets):
    scores = [torch.tensor(row) for row in rows]
    needs = (Attention(), Attention("next"), Attention(rows="chosen"))
    return visual_tokens([s[:, None] for s in scores], budgets, signals=dict.fromkeys(needs, scores))


def merged(tokens, reduction):
    """The features of the survivors, as an engine computes them, by index and row."""
    weights = ops.mean_weights(reduction.assign) if reduction.weights is None else reduction.weights
    out = ops.merge_tokens(tokens.features.float(), reduction.assign, weights)
    return [{i: out[row, i].tolist() for i in chosen(reduction.keep, row)} for row in range(len(out))]


def assignment(reduction, row, n):
    return {i: int(a) for i, a in enumerate(reduction.assign[row, :n]) if a >= 0}


def test_fastv_worked_example():
    tokens = with_scores([0.05, 0.20, 0.02, 0.10, 0.02, 0.06], [0.2, 0.2, 0.1, 0.2], budgets=[3, 2])
    reduction = attention_rank().reduce(tokens)
    assert [chosen(reduction.keep, i) for i in range(2)] == [[1, 3, 5], [0, 1]]
    assert reduction.assign is None


def test_pyramiddrop_worked_example():
    first = with_scores([0.1, 0.4, 0.05, 0.2, 0.3, 0.02, 0.25, 0.01], budgets=[4])
    kept = chosen(attention_rank(block="next").reduce(first).keep)
    assert kept == [1, 3, 4, 6]
    second = with_scores([0.2, 0.5, 0.1, 0.4], budgets=[2])
    assert [kept[i] for i in chosen(attention_rank(block="next").reduce(second).keep)] == [3, 6]


def test_attention_rank_asks_for_its_rows():
    (need,) = attention_rank(rows="text", block="next").needs()
    assert need == Attention("next", rows="text")
    with pytest.raises(ValueError, match="rows"):
        attention_rank(rows="chosen")


def test_raters_worked_example():
    tokens = visual_tokens([torch.eye(2)], [1], text={Features("text"): [torch.tensor([[2.0, 0], [0, 1], [0, 0]])]})
    assert TextRankRecycle().choose_rows(tokens).tolist() == [[True, True, False]]


@pytest.mark.parametrize("visual", range(1, 8))
def test_raters_where_no_word_is_above_average(visual):
    for words in range(1, 60):  # rounding puts some of the equal relevances a little above 1 / T, at 2 and 55 for one
        alike = torch.full((words, 4), 0.3)
        tokens = visual_tokens([torch.randn(visual, 4)], [1], text={Features("text"): [alike]})
        assert TextRankRecycle().choose_rows(tokens).all()


@pytest.mark.parametrize("seed", range(4))
def test_raters_against_the_literal_rule(seed):
    torch.manual_seed(seed)
    visual = [torch.randn(n, 6) for n in (4, 20, 11)]
    text = [torch.randn(n, 6) for n in (9, 3, 1)]
    rows = TextRankRecycle().choose_rows(visual_tokens(visual, [1, 1, 1], text={Features("text"): text}))
    for i, (v, t) in enumerate(zip(visual, text, strict=True)):
        assert chosen(rows, i) == rules.raters(v.double().tolist(), t.double().tolist())


def test_sparsevlm_worked_example():
    tokens = visual_tokens(
        [torch.tensor([[7.0], [8.0], [9.0], [10.0]])],
        [3],
        signals={Attention(rows="chosen"): [torch.tensor([0.075, 0.11, 0.065, 0.2])]},
    )
    reduction = TextRankRecycle().reduce(tokens)
    assert assignment(reduction, 0, 4) == {0: 0, 1: 1, 3: 3}
    assert merged(tokens, reduction) == [{0: [7.0], 1: [8.0], 3: [10.0]}]


@pytest.mark.parametrize("seed", range(5))
def test_sparsevlm_against_the_literal_rule(seed):
    torch.manual_seed(seed)
    lengths, budgets = [90, 5, 60, 1, 40], [40, 3, 9, 1, 40]
    features = [torch.randn(n, 4) * 2 for n in lengths]
    scores = [torch.rand(n) for n in lengths]
    tokens = visual_tokens(features, budgets, signals={Attention(rows="chosen"): scores})
    reduction = TextRankRecycle().reduce(tokens)
    for i, n in enumerate(lengths):
        expected = rules.sparsevlm(scores[i].tolist(), features[i].double().tolist(), budgets[i])
        assert assignment(reduction, i, n) == expected
        assert chosen(reduction.keep, i) == sorted(set(expected.values()))
        assert len(chosen(reduction.keep, i)) == budgets[i]
    for i, row in enumerate(merged(tokens, reduction)):
        target = assignment(reduction, i, lengths[i])
        for t, value in row.items():
            members = [features[i][j].tolist() for j in target if target[j] == t]
            assert value == pytest.approx(rules.mean(members), abs=1e-5)


def test_sparsevlm_without_recycling_is_a_ranking():
    tokens = with_scores(torch.rand(50).tolist(), torch.rand(20).tolist(), budgets=[20, 20])
    plain = TextRankRecycle(recycle=False).reduce(tokens)
    assert torch.equal(plain.keep, attention_rank().reduce(tokens).keep)
    assert plain.assign is None


def visionzip_tokens(dtype=torch.float32):
    keys = torch.tensor([[0.0, 0], [1, 0], [1, 0.1], [0, 1], [0, 1], [0, 0], [1, 1], [-1, 0]])
    return visual_tokens(
        [torch.tensor([[9.0], [1], [2], [3], [4], [5], [6], [7]]).to(dtype)],
        [4],
        signals={
            EncoderAttention(): [torch.tensor([0.40, 0.10, 0.05, 0.02, 0.03, 0.30, 0.06, 0.04])],
            EncoderProjection(): [keys.to(dtype)],
        },
    )


@pytest.mark.parametrize(("variant", "values"), [("official", (5.0, 9.0)), ("paper", (3.0, 14 / 3))])
def test_visionzip_worked_example(variant, values):
    # The spec counts the CLS token: D=3 are two patches and CLS, so two of four tokens here are contextual.
    tokens = visionzip_tokens()
    reduction = dominant_contextual(contextual=0.5, variant=variant).reduce(tokens)
    assert assignment(reduction, 0, 8) == {0: 0, 5: 5, 1: 1, 2: 1, 6: 1, 4: 4, 3: 4, 7: 4}
    (out,) = merged(tokens, reduction)
    assert out[0] + out[5] == [9.0, 5.0]
    assert out[1] + out[4] == pytest.approx(values)


def test_visionzip_splits_as_the_paper_does():
    for budget, contextual in [(192, 30), (128, 20), (64, 10), (32, 5), (1, 0), (4, 1)]:
        assert ops.share_of_count(budget, 0.15625) == contextual
        assert ops.share_of(torch.tensor([budget]), 0.15625).tolist() == [contextual]


@pytest.mark.parametrize("seed", range(5))
def test_visionzip_against_the_literal_rule(seed):
    torch.manual_seed(seed)
    lengths, budgets = [64, 10, 40, 3, 1, 30], [32, 10, 7, 2, 1, 29]
    features = [torch.randn(n, 5) for n in lengths]
    keys = [torch.randn(n, 6) for n in lengths]
    saliency = [torch.rand(n) for n in lengths]
    saliency[2][::3] = -INF
    saliency[5][1:] = -INF
    tokens = visual_tokens(features, budgets, signals={EncoderAttention(): saliency, EncoderProjection(): keys})
    reduction = dominant_contextual().reduce(tokens)
    for i, n in enumerate(lengths):
        expected = rules.visionzip(saliency[i].tolist(), keys[i].double().tolist(), budgets[i])
        assert assignment(reduction, i, n) == expected
        assert len(chosen(reduction.keep, i)) == budgets[i]
    for i, row in enumerate(merged(tokens, reduction)):
        target = assignment(reduction, i, lengths[i])
        for t, value in row.items():
            others = [features[i][j].tolist() for j in target if target[j] == t and j != t]
            added = rules.mean(others) if others else [0.0] * 5
            assert value == pytest.approx(
                [a + b for a, b in zip(features[i][t].tolist(), added, strict=True)], abs=1e-5
            )


def test_visionzip_drops_separators_and_never_merges_them():
    tokens = visionzip_tokens()
    tokens[EncoderAttention()][0, [2, 7]] = -INF
    reduction = dominant_contextual(contextual=0.5).reduce(tokens)
    assert not {2, 7} & set(assignment(reduction, 0, 8))
    assert reduction.keep.sum() == 4
