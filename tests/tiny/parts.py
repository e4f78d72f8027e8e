"""What the builders of tiny models share: token ids, configs of small parts, pieces of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS = 160, 64, 4
PAD, BOS = 0, 1
IMAGE, VIDEO, AUDIO, START, END = 100, 101, 102, 103, 104
SPECIAL = [PAD, BOS, 2, *range(100, 110)]
BEFORE, AFTER = (BOS, 11, 12, 13), (14, 15, 16, 17, 18, 19)


@dataclass(frozen=True)
class Piece:
    """One image or video: the ids that stand for it in the prompt, and the arrays that a processor would make of it."""

    ids: tuple[int, ...]
    arrays: Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How to build one model and what it may be shown.

    image, video, audio: make the piece number `n`; pieces differ in content and, where the family allows, in size.
    visual_ids: placeholder ids. token_types: the model wants `mm_token_type_ids`. tower: path of the encoder.
    per_sample: arrays with one row per sample, (1, pieces, ...), instead of one row per piece. packed: arrays joined
    along their last dim. derived: what else the model wants that follows from the ids (B, T) and the arrays. before:
    text in front of the first piece. lacks: kinds of prompt that the pieces permit but the library does not. wants:
    class that not every transformers has. modules: packages that it needs besides. types_from_start: in a later turn
    the model wants the token types of the whole conversation, as it reads them by position. broken: releases of
    transformers that cannot run it on pictures, squeezed or not (test_tiny_families.py shows it).
    """

    model: Callable[[], Any]
    image: Callable[[int], Piece] | None = None
    video: Callable[[int], Piece] | None = None
    visual_ids: tuple[int, ...] = (IMAGE, VIDEO)
    token_types: bool = False
    tower: str = "model.vision_tower"
    audio: Callable[[int], Piece] | None = None
    per_sample: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    derived: Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    before: tuple[int, ...] = BEFORE
    lacks: tuple[str, ...] = ()
    wants: str = ""
    modules: tuple[str, ...] = ()
    types_from_start: bool = False
    broken: tuple[str, ...] = ()


def build(cls: Any, config: Any, std: float = 0.12) -> Any:
    """Return the model with weights large enough that every token matters, in eval mode, with seed 0.

    std: of the matrices; smaller where rounding grows to more than 1e-5 (recurrent layers).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if not weight.is_floating_point():
                    continue
                if weight is head:
                    nn.init.normal_(weight, std=0.06)
                elif weight.ndim >= 2 and weight.std() < 0.2:
                    nn.init.normal_(weight, std=std)
                elif name.endswith("bias"):
                    nn.init.normal_(weight, std=0.05)
    model.eval()
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    generation.suppress_tokens = list(SPECIAL)
    generation.do_sample = False
    return model


def noise(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def llama_text(**changes: Any) -> dict[str, Any]:
    """Return the config of a Llama-like text model."""
    base = dict(model_type="llama", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96)
    base |= dict(num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    base |= dict(max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2)
    return base | changes


def qwen2_text(**changes: Any) -> dict[str, Any]:
    """Return the config of a Qwen2 text model."""
    return llama_text(model_type="qwen2") | changes


def mrope_text(**changes: Any) -> dict[str, Any]:
    """Return the config of a Qwen-VL text model."""
    base: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS)
    base |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    base |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]})
    return base | dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2) | changes


def tower_config(kind: str, image: int, patch: int = 7, layers: int = 3, **changes: Any) -> dict[str, Any]:
    """Return the config of a CLIP or SigLIP tower."""
    base = dict(model_type=kind, hidden_size=32, intermediate_size=64, num_hidden_layers=layers)
    return base | dict(num_attention_heads=4, image_size=image, patch_size=patch) | changes
