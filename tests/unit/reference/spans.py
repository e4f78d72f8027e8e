"""Five spans of different shapes with every signal, and what a reduction says of one row."""

from __future__ import annotations

import torch

from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.needs import (
    Attention,
    EncoderAttention,
    EncoderProjection,
    Features,
    Normed,
    Projection,
    Size,
)
from reference.build import chosen, visual_tokens

TILES = [(Tile(6, 3, 4),), (Tile(1, 5, 5),), (Tile(4, 2, 2),), (Tile(9, 2, 4),), (Tile(1, 1, 1),)]
LENGTHS = [sum(tile.cells for tile in tiles) for tiles in TILES]
WORDS = [9, 2, 5, 4, 1]


def spans(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)

    def noise(lengths, *tail):
        return [torch.randn(n, *tail).to(dtype) for n in lengths]

    return {
        "features": noise(LENGTHS, 12),
        "signals": {
            Attention(): [torch.rand(n) for n in LENGTHS],
            Attention("next"): [torch.rand(n) for n in LENGTHS],
            Attention(rows="text"): [torch.rand(n) for n in LENGTHS],
            Attention(rows="chosen"): [torch.rand(n) for n in LENGTHS],
            Projection(): noise(LENGTHS, 8),
            Projection(heads="mean"): noise(LENGTHS, 4),
            Normed(): noise(LENGTHS, 12),
            EncoderAttention(): [torch.rand(n) for n in LENGTHS],
            EncoderProjection(): noise(LENGTHS, 6),
            Size(): [torch.randint(1, 4, (n,)).float() for n in LENGTHS],
        },
        "text": {
            Features("text"): noise(WORDS, 12),
            Normed("text"): noise(WORDS, 12),
            Projection(of="text"): noise(WORDS, 8),
        },
    }


def batch(data, budgets, rows=range(5), width=None):
    rows = list(rows)

    def pick(lists):
        return {name: [values[i] for i in rows] for name, values in lists.items()}

    return visual_tokens(
        [data["features"][i] for i in rows],
        [budgets[i] for i in rows],
        tiles=[TILES[i] for i in rows],
        signals=pick(data["signals"]),
        text=pick(data["text"]),
        width=width,
    )


def of_text(need):
    return getattr(need, "of", "visual") == "text"


def share(fraction):
    return [ops.kept_count(n, keep=fraction) for n in LENGTHS]


def answer(reduction, row):
    """Survivors and who is merged into whom with which weight, of one row."""
    kept = chosen(reduction.keep, row)
    if reduction.assign is None:
        return kept, None
    weights = ops.mean_weights(reduction.assign) if reduction.weights is None else reduction.weights
    pairs = {i: (int(a), round(float(weights[row, i]), 5)) for i, a in enumerate(reduction.assign[row]) if a >= 0}
    return kept, pairs
