"""Five spans of different shapes with every signal, and what a reduction says of one row."""

from __future__ import annotations

import torch

from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.needs import Attention, EncoderAttention, Features, Runs, Sensitivity, Size, SoundAttention
from reference.build import chosen, visual_tokens

TILES = [(Tile(6, 3, 4),), (Tile(1, 5, 5),), (Tile(4, 2, 2),), (Tile(9, 2, 4),), (Tile(1, 1, 1),)]
LENGTHS = [sum(tile.cells for tile in tiles) for tiles in TILES]
WORDS = [9, 2, 5, 4, 1]
HEADS = 3
# Tokens in front of the visual ones, where a signal speaks of all.
LEAD = 2


def spans_with(needs, seed=0, dtype=torch.float32):
    """Five spans with these signals."""
    torch.manual_seed(seed)

    def noise(lengths, *tail):
        return [torch.randn(n, *tail).to(dtype) for n in lengths]

    def drawn(need, lengths):
        kind = dtype if wide(need) else torch.int64 if isinstance(need, Runs) else torch.float32
        return [one(need, n, words).to(kind) for n, words in zip(lengths, WORDS, strict=True)]

    signals = {need: drawn(need, LENGTHS) for need in needs}
    words = {need: drawn(need, WORDS) for need in needs}
    whole = {need: drawn(need, [LEAD + n + w for n, w in zip(LENGTHS, WORDS, strict=True)]) for need in needs}
    own = {need: rows for need, rows in signals.items() if not of_text(need) and need != Features()}
    return {
        "features": noise(LENGTHS, 12),
        "signals": {need: rows for need, rows in own.items() if not of_all(need)},
        "text": {need: rows for need, rows in words.items() if of_text(need)},
        "whole": {need: rows for need, rows in whole.items() if of_all(need)},
    }


def wide(need):
    """Whether it is a vector per token, and not a number."""
    return not isinstance(need, (Attention, EncoderAttention, Runs, Sensitivity, Size, SoundAttention))


def one(need, n, words):
    """A signal of n tokens: a number each, by heads and words, or a vector as long for words as for the picture."""
    if isinstance(need, Size):
        return torch.randint(1, 4, (n,)).float()
    if isinstance(need, Runs):
        return torch.zeros(n)
    if isinstance(need, (Sensitivity, SoundAttention)):
        return torch.rand(n)
    if isinstance(need, (Attention, EncoderAttention)):
        heads = [HEADS] if need.heads == "each" else []
        rows = [words] if getattr(need, "over_rows", "") == "each" else []
        return torch.rand(n, *heads, *rows)
    if getattr(need, "heads", "") == "each":
        return torch.randn(n, HEADS, 8)
    return torch.randn(n, 8 if "Projection" in type(need).__name__ else 12)


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
        whole=pick(data["whole"]),
        lead=LEAD,
        width=width,
    )


def of_all(need):
    return getattr(need, "of", "visual") == "all"


def of_text(need):
    return "text" in (getattr(need, "of", "visual"), getattr(need, "columns", "visual"))


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
