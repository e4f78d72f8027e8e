"""Methods written as parts choose, and weigh, exactly as the classes that they were before."""

from __future__ import annotations

import pytest
import torch
from reference.classes.attention_rank import AttentionRank
from reference.classes.average_pool import AveragePool
from reference.classes.bipartite_merge import BipartiteMerge
from reference.classes.dominant_contextual import DominantContextual
from reference.classes.farthest_point import FarthestPoint
from reference.classes.frame_uniqueness import FrameUniqueness
from reference.classes.pivot_dissimilar import PivotDissimilar
from reference.classes.random_subset import RandomSubset
from reference.classes.uniform_stride import UniformStride
from reference.spans import LENGTHS, batch, share, spans_with

from mllm_squeeze.reducers.pipeline import Pipeline

TURNS = {"in_turn": [{"select": "top_k"}, {"select": {"stride": "whole"}, "share": 0.15625}]}
PAIRS = [
    (AttentionRank, {}, {"score": "attention"}),
    (AttentionRank, {"rows": "text"}, {"score": {"attention": "text"}}),
    (AttentionRank, {"source": "next"}, {"score": {"attention": {"block": "next", "rows": "last"}}}),
    (RandomSubset, {"seed": 7}, {"score": {"random": 7}}),
    (UniformStride, {"grid": True}, {"select": {"even_sample": True}}),
    (UniformStride, {"grid": False}, {"select": {"even_sample": False}}),
    (FarthestPoint, {}, {"select": "farthest_point"}),
    (
        DominantContextual,
        {},
        {
            "score": "encoder_attention",
            "select": TURNS,
            "merge": {"nearest": {"by": "encoder_keys", "into": "last", "weights": "added_mean"}},
        },
    ),
    (
        DominantContextual,
        {"variant": "paper"},
        {
            "score": "encoder_attention",
            "select": TURNS,
            "merge": {"nearest": {"by": "encoder_keys", "into": "last"}},
        },
    ),
    (
        PivotDissimilar,
        {"pivots": 2, "words": 3},
        {"score": {"norm": {"of": "keys", "order": 1}}, "select": {"pivots": {"pivots": 2, "words": 3}}},
    ),
    (
        PivotDissimilar,
        {"variant": "official"},
        {"score": {"norm": {"of": "keys", "order": 1}}, "select": {"pivots": {"variant": "official"}}},
    ),
    (BipartiteMerge, {}, {"merge": "bipartite"}),
    (AveragePool, {}, {"merge": "pool"}),
    *(
        (
            FrameUniqueness,
            {"channels": channels, "temperature": temperature},
            {
                "segment": "frame",
                "score": {
                    "fused": [
                        {"score": {"uniqueness": {"against": a, "channels": channels}}} for a in ("span", "group")
                    ]
                },
                "budget": {
                    "softmax": {"temperature": temperature, "score": {"uniqueness": {"channels": channels}}},
                },
            },
        )
        for channels, temperature in ((0.5, 0.01), (1.0, 1.0))
    ),
]


@pytest.mark.parametrize(("cls", "options", "parts"), PAIRS, ids=[f"{p[0].__name__}-{n}" for n, p in enumerate(PAIRS)])
def test_parts_answer_bit_for_bit_like_the_class(cls, options, parts):
    reducer, pipeline = cls(**options), Pipeline(**parts)
    for seed in range(3):
        data = spans_with(reducer.needs(), seed)
        for fraction in (0.02, 0.1, 0.34, 0.5, 0.77, 0.98, 1.0):
            for tokens in (batch(data, share(fraction), width=80), batch(data, [n + 3 for n in LENGTHS])):
                old, new = reducer.reduce(tokens), pipeline.reduce(tokens)
                assert torch.equal(old.keep, new.keep)
                for before, after in ((old.assign, new.assign), (old.weights, new.weights)):
                    assert (before is None) == (after is None)
                    assert before is None or torch.equal(before, after)


@pytest.mark.parametrize(("cls", "options", "parts"), PAIRS, ids=[f"{p[0].__name__}-{n}" for n, p in enumerate(PAIRS)])
def test_parts_say_the_same_of_themselves(cls, options, parts):
    reducer, pipeline = cls(**options), Pipeline(**parts)
    old, new = reducer.facts, pipeline.facts
    assert old.places <= new.places
    for fact in ("known_count", "decides", "merges", "reads_text", "modalities"):
        assert getattr(old, fact) == getattr(new, fact), fact
    assert set(reducer.needs()) == set(pipeline.needs())
    if reducer.known_count:
        for current, budget in ((72, 30), (25, 24), (25, 25), (9, 1), (40, 13)):
            assert reducer.count(current, budget, ()) == pipeline.count(current, budget, ())
