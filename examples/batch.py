"""A padded batch: several pictures and questions of different length in one call.

python examples/batch.py
python examples/batch.py --model llava-hf/llava-1.5-7b-hf --method visionzip --ratio 0.75
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo


def main(arguments: list[str] | None = None) -> None:
    """Answer a batch, then the same prompts one by one: each row keeps the same tokens either way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.folder(), help="a checkpoint; the tiny model in the box by default")
    parser.add_argument("--method", default="visionzip")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
    # Generation continues a prompt at its right end, so padding belongs on the left.
    processor = AutoProcessor.from_pretrained(options.model, padding_side="left")

    items = list(demo.held_out(4))
    texts = []
    for item in items:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))

    def ask(rows: slice) -> list[str]:
        pictures = [[item.picture] for item in items[rows]]
        inputs = processor(images=pictures, text=texts[rows], padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        written = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in written]

    with squeeze.applied(model, options.method, ratio=options.ratio) as handle:
        together = ask(slice(None))
        report = handle.report()
        alone = [ask(slice(row, row + 1))[0] for row in range(len(items))]

    for item, batched, single in zip(items, together, alone, strict=True):
        print(f"{item.question}\n    in the batch: {batched}   alone: {single}   right: {item.answer}")
    print()
    print(report)


if __name__ == "__main__":
    main()
