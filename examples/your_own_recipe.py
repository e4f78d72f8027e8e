"""A method of your own, composed of two rules in a YAML file: no code.

python examples/your_own_recipe.py
python examples/your_own_recipe.py --model llava-hf/llava-1.5-7b-hf --recipe my_method.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo

RECIPE = Path(__file__).with_name("your_own_recipe.yaml")


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe as it is, and with another value for one of its parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.folder(), help="a checkpoint; the tiny model in the box by default")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    item = next(demo.held_out(1))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=item.picture, text=text, return_tensors="pt").to(model.device, model.dtype)

    print(options.recipe.read_text(encoding="utf-8"))
    for params in ({}, {"ratio": 0.9}):
        with squeeze.applied(model, str(options.recipe), **params) as handle:
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            print(f"--- {params or 'as written'}: {item.question} {answer} (right: {item.answer})\n")
            print(handle.report())
            print()


if __name__ == "__main__":
    main()
