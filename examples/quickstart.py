"""Squeeze a model, let it answer, read the report, take the method off again.

python examples/quickstart.py                                              # the tiny LLaVA in the box, on any CPU
python examples/quickstart.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --question "What is the cat doing?"
"""

from __future__ import annotations

import argparse

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo


def main(arguments: list[str] | None = None) -> None:
    """Answer one question dense, squeezed and dense again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.folder(), help="a checkpoint; the tiny model in the box by default")
    parser.add_argument("--method", default="fastv", help="a method's name, or the path of a recipe")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the visual tokens to remove")
    parser.add_argument("--image", help="a picture; one is drawn by default")
    parser.add_argument("--question", help="what to ask about it")
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    item = next(demo.held_out(1))
    picture = Image.open(options.image).convert("RGB") if options.image else item.picture
    question = options.question or item.question

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt").to(model.device, model.dtype)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return str(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    print("question:", question)
    print("dense:   ", answer())

    handle = squeeze.apply(model, options.method, ratio=options.ratio)
    print("squeezed:", answer())
    print()
    print(handle.report())
    print()

    handle.remove()
    print("removed: ", answer())


if __name__ == "__main__":
    main()
