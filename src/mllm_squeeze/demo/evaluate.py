"""How often a model, pruned or not, answers held-out questions rightly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from .questions import Item

# An answer is one word and </s>; a model that goes on behind its word shows it within these.
NEW_TOKENS = 8


def prompt(processor: Any, question: str) -> str:
    """The chat text for one picture and one question, ending where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


@torch.no_grad()
def answers(
    model: Any, processor: Any, items: Iterable[Item], batch_size: int = 25, device: str | torch.device = "cpu"
) -> list[str]:
    """The model's whole answers in words, greedy, up to </s> or NEW_TOKENS tokens, in the order of the items."""
    given: list[str] = []
    queue = iter(items)
    while batch := list(islice(queue, batch_size)):
        texts = [prompt(processor, item.question) for item in batch]
        inputs = processor(images=[item.picture for item in batch], text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(device)
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        fresh = written[:, inputs["input_ids"].shape[1] :]
        given += [processor.decode(_until(row, model.generation_config.eos_token_id)) for row in fresh.tolist()]
    return given


def _until(row: list[int], end: int) -> list[int]:
    """The tokens before </s>; any other special token is a part of what was said, and a mistake."""
    return row[: row.index(end)] if end in row else row


def accuracy(
    model: Any, processor: Any, items: Iterable[Item], batch_size: int = 25, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """The share of items whose whole answer is the right word: under "overall", and under the name of each kind."""
    items = list(items)
    right: dict[str, list[bool]] = defaultdict(list)
    for item, given in zip(items, answers(model, processor, items, batch_size, device), strict=True):
        for key in ("overall", item.kind):
            right[key].append(given == item.answer)
    return {key: sum(hits) / len(hits) for key, hits in sorted(right.items(), key=lambda pair: pair[0] != "overall")}
