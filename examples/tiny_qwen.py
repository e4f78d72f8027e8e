"""A Qwen2.5-VL with random weights and its processor, small enough for any CPU, for `video.py` without --model."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def processor() -> Qwen2_5_VLProcessor:
    """The real processor's code over a vocabulary of a few dozen words."""
    words = [f"word{i}" for i in range(100)]
    table = {word: i for i, word in enumerate(("<unk>", *SPECIAL, "user", "assistant", *words))}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<unk>", additional_special_tokens=list(SPECIAL)
    )
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=sizes),
        tokenizer=tokens,
        video_processor=Qwen2VLVideoProcessor(size=sizes, cap_pixels_per_frame=True),
        chat_template=CHAT,
    )


def model(tokens: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Eight decoder layers of width 64, random."""
    torch.manual_seed(0)
    start, end, image, video = (int(tokens.get_vocab()[word]) for word in SPECIAL[:4])
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "fullatt_block_indexes": [1, 3],
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
