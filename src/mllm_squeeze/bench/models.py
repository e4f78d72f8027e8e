"""Builds a benchmark model with random weights, and a prompt with the wished number of visual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from mllm_squeeze.bench.features import take_features
from mllm_squeeze.bench.shapes import Shape
from mllm_squeeze.errors import ConfigError

START, END, IMAGE, VIDEO = 120, 121, 122, 123
_PLAIN = 100  # text tokens are drawn from 10 to here
_LARGEST_PICTURE = 16384
_SIDES = (16, 28, 36, 48, 64)


@dataclass(frozen=True)
class Prompt:
    """A batch of equal prompts: text, pictures, text.

    inputs: what the text side takes (input_ids, attention_mask, ...), without pictures. vision: what the encoder takes.
    positions: int64 position ids of the prompt, (B, T) or (3, B, T). after: position ids of the tokens to decode.
    visual: visual tokens per prompt. decoded: int64 (B, n), the tokens that every contestant is made to decode.
    """

    inputs: dict[str, Tensor]
    vision: dict[str, Tensor]
    positions: Tensor
    after: Tensor
    visual: int
    decoded: Tensor

    @property
    def length(self) -> int:
        """Tokens per prompt."""
        return self.inputs["input_ids"].shape[1]


def build(
    shape: Shape, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> Any:
    """Return the model, in eval mode, with random weights drawn on the device (seed 0).

    tokens: visual tokens; a picture that grows needs an encoder that takes it.

    Raises:
        ConfigError: the attention implementation is not there.
    """
    names = shape.classes
    config_class, model_class = getattr(transformers, names[0]), getattr(transformers, names[1])
    vision = dict(shape.vision)
    if shape.line == "llava" and not shape.fixed:
        vision["image_size"] = side(tokens) * vision["patch_size"]
    config = config_class(text_config=dict(shape.text), vision_config=vision, **_ids(shape), **(shape.rest or {}))
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []), torch.device(device):
        torch.manual_seed(0)
        try:
            model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"The attention implementation '{attention}' cannot be used here: {error}") from error
    take_features(model)
    return model.to(dtype).eval()


def _ids(shape: Shape) -> dict[str, Any]:
    if shape.line == "qwen":
        return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    return dict(image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default")


def side(tokens: int) -> int:
    """Return the side of the square picture whose patches are closest to `tokens` in number."""
    return max(2, math.floor(math.sqrt(tokens) + 0.5))


def rectangle(tokens: int) -> tuple[int, int]:
    """Return (height, width) of about `tokens` cells: exactly as many where a picture up to 4:1 has them."""
    for height in range(math.isqrt(tokens), 0, -1):
        if tokens % height == 0 and tokens // height <= 4 * height:
            return height, tokens // height
    height = max(1, math.isqrt(tokens))
    return height, max(1, math.floor(tokens / height + 0.5))


def prompt(
    shape: Shape, model: Any, tokens: int, batch: int = 1, text: int = 64, steps: int = 16, seed: int = 0
) -> Prompt:
    """Return prompts with about `tokens` visual tokens each, as near as the model's pictures allow.

    text: text tokens per prompt, half of them (rounded up) in front of the pictures. steps: tokens to decode.
    """
    device, dtype = model.device, model.dtype
    draw = torch.Generator().manual_seed(seed)
    pictures, vision = _pictures(shape, model, tokens, batch, draw)
    front = torch.randint(10, _PLAIN, (batch, text - text // 2), generator=draw)
    back = torch.randint(10, _PLAIN, (batch, text // 2), generator=draw)
    middle = torch.tensor(pictures).expand(batch, -1)
    ids = torch.cat([front, middle, back], 1).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in vision.items()}
    if shape.line == "qwen":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    positions, after = _positions(model, inputs, vision, steps)
    decoded = torch.randint(10, _PLAIN, (batch, steps), generator=draw).to(device)
    return Prompt(inputs, vision, positions, after, int((ids[0] == IMAGE).sum()), decoded)


def _positions(model: Any, inputs: dict[str, Tensor], vision: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    ids = inputs["input_ids"]
    batch, length = ids.shape
    after = torch.arange(length, length + steps, device=ids.device).expand(batch, -1)
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(length, device=ids.device).expand(batch, -1), after
    found, delta = model.model.get_rope_index(**inputs, image_grid_thw=vision["image_grid_thw"])
    return found, (after + delta.to(after.device)).expand(3, -1, -1)


def _pictures(
    shape: Shape, model: Any, tokens: int, batch: int, draw: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    """Return the ids of one prompt's pictures, and what the encoder takes for the whole batch."""
    make = {"llava": _square, "llava_next": _tiled, "qwen": _grid}[shape.line]
    return make(shape, model.config.vision_config, tokens, batch, draw)


def _square(
    shape: Shape, config: Any, tokens: int, batch: int, draw: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    each = (config.image_size // config.patch_size) ** 2
    count = max(1, math.floor(tokens / each + 0.5)) if shape.fixed else 1
    pixels = torch.randn(batch * count, 3, config.image_size, config.image_size, generator=draw)
    return [IMAGE] * (each * count), {"pixel_values": pixels}


def _tiled(
    shape: Shape, config: Any, tokens: int, batch: int, draw: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    """Pictures of four tiles and the whole; one newline feature ends each row of the tiles."""
    across = config.image_size // config.patch_size
    each = across**2 + 2 * across * (2 * across + 1)
    count = max(1, math.floor(tokens / each + 0.5))
    pixels = torch.randn(batch * count, 5, 3, config.image_size, config.image_size, generator=draw)
    sizes = torch.tensor([[2 * config.image_size] * 2] * (batch * count))
    return [IMAGE] * (each * count), {"pixel_values": pixels, "image_sizes": sizes}


def _grid(
    shape: Shape, config: Any, tokens: int, batch: int, draw: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    """Pictures of any size up to what the family allows; a token covers 2 x 2 patches."""
    count = math.ceil(tokens / _LARGEST_PICTURE)
    height, width = rectangle(tokens // count)
    merge, patch = config.spatial_merge_size, config.patch_size
    grid = torch.tensor([[1, merge * height, merge * width]] * (batch * count))
    values = 3 * config.temporal_patch_size * patch * patch
    pixels = torch.randn(int(grid.prod(-1).sum()), values, generator=draw)
    one = [START, *[IMAGE] * (height * width), END]
    return one * count, {"pixel_values": pixels, "image_grid_thw": grid}
