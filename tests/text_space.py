"""An untrained CLIP or SigLIP whose vision tower is as wide as that of the tiny models, as a user gives it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import mllm_squeeze as squeeze
from tiny.parts import PAD, SPECIAL, VOCAB

PLACES, WIDTH, START, END = 16, 32, 1, 2


def tokenizer(frame: bool) -> Any:
    """Return a tokenizer of words w000, w001, ...; frame: with a start and an end, as text encoders have."""
    words = {f"w{n:03}": n for n in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w003"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        ends = [("w001", START), ("w002", END)]
        made.post_processor = processors.TemplateProcessing(single="w001 $A w002", special_tokens=ends)
    special = [f"w{n:03}" for n in ((PAD, START, END) if frame else SPECIAL)]
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w000", extra_special_tokens=special)


@functools.cache
def pair(kind: str, width: int = WIDTH) -> nn.Module:
    """Return an untrained CLIP or SigLIP model whose vision tower is as wide as that of the tiny models."""
    shape = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = shape | dict(vocab_size=VOCAB, max_position_embeddings=PLACES, bos_token_id=START, eos_token_id=END)
    vision = shape | dict(hidden_size=width, image_size=28, patch_size=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "clip":
            config: Any = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
            return hf.CLIPModel(config).eval()
        config = hf.SiglipConfig(text_config=text | {"projection_size": width}, vision_config=vision)
        return hf.SiglipModel(config).eval()


def encoder(kind: str = "clip", **changes: Any) -> Any:
    """Return the text encoder as a user gives it."""
    given = {"tokenizer": tokenizer(False), "own_tokenizer": tokenizer(True)} | changes
    return squeeze.TextEncoder(pair(kind), **given)
