"""Tiny models of the Idefics family: tiles of one sample stand in one row of the pixel tensor."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tiny.parts import IMAGE, PAD, Family, Piece, build, llama_text, noise

FAKE, BREAK, GLOBAL = 103, 107, 105  # around each tile, behind each row of tiles, before the small whole picture
TILE = 28
TILE_GRIDS = ((2, 2), (1, 2), (3, 1))
LATENTS = 20


def _vision() -> dict[str, Any]:
    base = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return base | dict(image_size=TILE, patch_size=7)


def _idefics2() -> Any:
    perceiver = dict(resampler_n_latents=LATENTS, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=16)
    config = hf.Idefics2Config(
        vision_config=_vision(),
        perceiver_config=perceiver | dict(num_key_value_heads=2, hidden_size=64),
        text_config=llama_text(model_type="mistral", sliding_window=None),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return build(hf.Idefics2ForConditionalGeneration, config)


def _idefics2_image(n: int) -> Piece:
    """Return an image of any shape, or of two crops; each becomes LATENTS tokens."""
    height, width = ((TILE, TILE), (TILE - 7, TILE), (TILE, TILE - 14))[n % 3]
    crops = 2 if n % 3 == 2 else 1
    arrays = {
        "pixel_values": noise(n, 1, crops, 3, height, width),
        "pixel_attention_mask": torch.ones(1, crops, height, width, dtype=torch.bool),
    }
    return Piece((FAKE, *((*(IMAGE,) * LATENTS, FAKE) * crops)), arrays)


def _tiled(cls: Any, config: Any) -> Any:
    return build(
        cls,
        config(
            vision_config=_vision(), text_config=llama_text(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
        ),
    )


def _idefics3() -> Any:
    return _tiled(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config)


def _smolvlm() -> Any:
    return _tiled(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig)


def tile_arrays(seed: int, tiles: int) -> dict[str, torch.Tensor]:
    """Return the pixels of one sample's tiles and the mask over them."""
    return {
        "pixel_values": noise(seed, 1, tiles, 3, TILE, TILE),
        "pixel_attention_mask": torch.ones(1, tiles, TILE, TILE, dtype=torch.bool),
    }


def tiled_ids(n: int) -> tuple[tuple[int, ...], int]:
    """Return the ids of rows of tiles with 2x2 tokens each, the small whole picture last, and the number of tiles."""
    rows, columns = TILE_GRIDS[n % len(TILE_GRIDS)]
    ids: tuple[int, ...] = ()
    for row in range(rows):
        for column in range(columns):
            ids += (FAKE, 110 + 3 * row + column, *(IMAGE,) * 4)
        ids += (BREAK,)
    return (*ids, BREAK, FAKE, GLOBAL, *(IMAGE,) * 4, FAKE), rows * columns + 1


def _tiled_image(n: int) -> Piece:
    ids, tiles = tiled_ids(n)
    return Piece(ids, tile_arrays(n, tiles))


def _frames(n: int) -> Piece:
    """Return a video of 4, 3 or 5 frames, each a picture of its own behind its time stamp."""
    frames = (4, 3, 5)[n % 3]
    ids: tuple[int, ...] = ()
    for frame in range(frames):
        ids += (20 + frame, FAKE, GLOBAL, *(IMAGE,) * 4, FAKE)
    return Piece(ids, tile_arrays(50 + n, frames))


_ROWS = ("pixel_values", "pixel_attention_mask")
IDEFICS_LINE = {
    "idefics2": Family(_idefics2, _idefics2_image, visual_ids=(IMAGE,), tower="model.vision_model", per_sample=_ROWS),
    "idefics3": Family(_idefics3, _tiled_image, visual_ids=(IMAGE,), tower="model.vision_model", per_sample=_ROWS),
    "smolvlm": Family(
        _smolvlm, _tiled_image, _frames, visual_ids=(IMAGE,), tower="model.vision_model", per_sample=_ROWS
    ),
}
