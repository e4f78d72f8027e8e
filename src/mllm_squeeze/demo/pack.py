"""Training batches: one picture with many questions in one sequence, each question as if it stood there alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from .build import ASSISTANT, BOS, IMAGE, PAD, USER
from .pictures import GRID, Scene, draw
from .questions import Question, ask
from .tower import HEADS, IGNORE, labels

TOKENS = GRID * GRID
NAMED = ("colour", "shape", "digit")


@dataclass
class Pictures:
    """A batch for the tower: pixels [B, 3, SIDE, SIDE], classes [B, 4, N], things per word [B, 34], and the scenes."""

    pixels: torch.Tensor
    dense: torch.Tensor
    counts: torch.Tensor
    scenes: list[Scene]


@dataclass
class Packed:
    """A batch for the whole model: ids and positions [B, S], mask [B, 1, S, S] (True where a token may attend).

    ask [B, Q] is where each answer is predicted, the answer itself standing one further; answers [B, Q] are token ids;
    spots [B, Q, N] is True on the visual tokens of the things that each question is about;
    named [B, Q, 3] is the colour, shape and digit word that the question itself has, counted from 1, or 0 for none.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    ask: torch.Tensor
    answers: torch.Tensor
    spots: torch.Tensor
    named: torch.Tensor

    def to(self, device: str) -> Packed:
        """The same batch on another device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


def paint(rng: np.random.Generator, batch: int, things: tuple[int, int]) -> Pictures:
    """`batch` pictures with labels for the tower."""
    drawn = [draw(rng, things) for _ in range(batch)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in drawn])).permute(0, 3, 1, 2)
    marked = [labels(scene) for _, scene in drawn]
    return Pictures(
        pixels=(pixels.float() / 255 - 0.5) / 0.25,
        dense=torch.from_numpy(np.stack([dense for dense, _ in marked])),
        counts=torch.from_numpy(np.stack([counts for _, counts in marked])),
        scenes=[scene for _, scene in drawn],
    )


def pack(
    scenes: list[Scene],
    tokens: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    questions: int,
    shares: dict[str, float] | None = None,
) -> Packed:
    """The sequences `<s> user: <image>* (question assistant: answer)*` for these scenes, `questions` to each."""
    asked = [(scene, ask(scene, rng, questions, shares)) for scene in scenes]
    table = tokens.get_vocab()
    head = [table[BOS], table[USER], *[table[IMAGE]] * TOKENS]
    rows = []
    for _, row in asked:
        tails = tokens([f"{question.text} {ASSISTANT}" for question in row], add_special_tokens=False)["input_ids"]
        rows.append([[*tail, table[question.answer]] for tail, question in zip(tails, row, strict=True)])
    size = len(head) + max(sum(map(len, blocks)) for blocks in rows)
    ids = torch.full((len(scenes), size), table[PAD])
    positions = torch.zeros(len(scenes), size, dtype=torch.long)
    owner = torch.full((len(scenes), size), questions)
    for i, blocks in enumerate(rows):
        lengths = torch.tensor([len(head), *map(len, blocks)])
        filled = int(lengths.sum())
        ids[i, :filled] = torch.tensor([*head, *(token for block in blocks for token in block)])
        positions[i, :filled] = torch.cat(
            [torch.arange(len(head)), *(len(head) + torch.arange(n) for n in lengths[1:])]
        )
        owner[i, :filled] = torch.arange(-1, questions).repeat_interleave(lengths)
    ends = torch.tensor([[len(block) for block in blocks] for blocks in rows]).cumsum(1) + len(head)
    # Causal, all see the picture, and no question sees another.
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    mask = causal & ((owner[:, None] == -1) | (owner[:, None] == owner[:, :, None]))
    return Packed(
        ids=ids,
        positions=positions,
        mask=mask[:, None],
        ask=ends - 2,
        answers=torch.tensor([[table[question.answer] for question in row] for _, row in asked]),
        spots=torch.stack([_spots(scene, row) for scene, row in asked]),
        named=torch.tensor([[_named(scene, question) for question in row] for scene, row in asked]),
    )


def _spots(scene: Scene, asked: list[Question]) -> torch.Tensor:
    """The visual tokens of the things that each question is about, bool [Q, N]."""
    covered = [scene.patches(i) for i in range(len(scene.things))]
    spots = torch.zeros(len(asked), TOKENS, dtype=torch.bool)
    for row, question in enumerate(asked):
        for index in question.things:
            spots[row, covered[index]] = True
    return spots


def _named(scene: Scene, question: Question) -> list[int]:
    """The classes (from 1; 0 where not named) of the colour, shape and digit words in a question."""
    if not question.things:
        return [IGNORE] * len(NAMED)
    thing = scene.things[question.things[0]]
    return [HEADS[name].index(getattr(thing, name)) + 1 if name in question.keys else 0 for name in NAMED]
