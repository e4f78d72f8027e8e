"""Several turns on one cache: the picture is read and squeezed once, every later question sees only the survivors.

python examples/turns.py
python examples/turns.py --model llava-hf/llava-1.5-7b-hf --method divprune
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import mllm_squeeze as squeeze
from mllm_squeeze import demo

QUESTIONS = ("How many red ones are there?", "How many stars are there?", "How many blue ones are there?")


def main(arguments: list[str] | None = None) -> None:
    """Ask three questions about one picture, handing the cache from turn to turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.folder(), help="a checkpoint; the tiny model in the box by default")
    # A method that does not read the question suits a conversation: the next question may be about something else.
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    picture = next(demo.held_out(1)).picture
    cache: Any = DynamicCache(config=model.config.get_text_config())
    # transformers calls the argument `cache` since 5.24.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    seen: torch.Tensor | None = None

    with squeeze.applied(model, options.method, ratio=options.ratio) as handle:
        for turn, question in enumerate(QUESTIONS):
            content = [{"type": "text", "text": question}]
            if turn == 0:
                content.insert(0, {"type": "image"})
            chat = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            if seen is None:
                inputs = processor(images=picture, text=text, return_tensors="pt").to(model.device, model.dtype)
                fresh = dict(inputs)
            else:
                # What was said so far is in the cache; the ids say what it was, generate() runs only what is new.
                text = text.removeprefix(processor.tokenizer.bos_token or "")
                added = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
                ids = torch.cat([seen, added["input_ids"]], dim=1)
                fresh = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = model.generate(**fresh, **{name: cache}, max_new_tokens=16, do_sample=False)
            said = processor.decode(out[0, fresh["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            held = [layer.keys.shape[-2] for layer in cache.layers]
            print(f"{question} {said}\n    tokens seen: {cache.get_seq_length()}   held per layer: {held}")
            seen = out
    print()
    print(handle.report())


if __name__ == "__main__":
    main()
