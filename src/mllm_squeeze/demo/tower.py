"""First stage: the vision tower learns to see, from labels for every patch and for the CLS token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from .pictures import COLOURS, DIGITS, GRID, PLACES, SHAPES, Scene, coverage

# A patch is called a part of a thing from this share of its area on, empty below the other, and not labelled between.
PART, EMPTY = 0.35, 0.2
IGNORE = -100
HEADS = {"colour": tuple(COLOURS), "shape": SHAPES, "digit": DIGITS, "place": PLACES}
WORDS = [word for values in HEADS.values() for word in values]


def labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Classes per patch, int [4, N] in the order of HEADS (0: background), and things per word, float [34]."""
    dense = np.zeros((len(HEADS), GRID * GRID), dtype=np.int64)
    dense[-1] = IGNORE
    counts = np.zeros(len(WORDS), dtype=np.float32)
    for thing in scene.things:
        cover = coverage(thing).ravel()
        part = cover >= PART
        dense[:, (cover >= EMPTY) & ~part] = IGNORE
        start = 0
        for row, (name, values) in enumerate(HEADS.items()):
            index = values.index(getattr(thing, name))
            dense[row, part] = index + 1
            counts[start + index] += 1
            start += len(values)
    return dense, counts


class Teacher(nn.Module):
    """Linear heads on the feature layer: a word of each kind for every patch, and all counts from the CLS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in HEADS.items()})
        self.cls = nn.Linear(width, len(WORDS))

    def forward(
        self, states: torch.Tensor, dense: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss for tower states [B, 1 + N, C], and the share of thing patches named rightly per kind."""
        loss = states.new_zeros(())
        right = {}
        for row, (name, head) in enumerate(self.patches.items()):
            logits, target = head(states[:, 1:]), dense[:, row]
            # Four patches in five are background: at full weight they would drown the rest.
            weight = torch.tensor([0.1] + [1.0] * (logits.shape[-1] - 1), device=logits.device)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight, ignore_index=IGNORE)
            hits = (logits.argmax(-1) == target)[target > 0]
            right[name] = hits.float().mean().item()
        # Counts rather than presence: the CLS must look at all things alike to get them right.
        guesses = self.cls(states[:, 0])
        right["counts"] = (guesses.round() == counts).float().mean().item()
        return loss + F.mse_loss(guesses, counts), right


def see(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's states at the feature layer, [B, 1 + N, C]; the unused layers above it do not run."""
    tower: Any = model.model.vision_tower
    last: Any = model.config.vision_feature_layer
    # Some versions of transformers wrap the tower once more.
    core = getattr(tower, "vision_model", tower)
    states: torch.Tensor = core.pre_layrnorm(core.embeddings(pixels))
    for layer in core.encoder.layers[: last + 1]:
        output = layer(states, attention_mask=None)
        states = output[0] if isinstance(output, tuple) else output
    return states
