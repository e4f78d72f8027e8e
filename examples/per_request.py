"""Requests with budgets and reports of their own, in threads on one squeezed model; then another method."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer one question with several budgets at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.9], help="one for each request")
    chosen = parser.parse_args(arguments)

    item = next(demo.held_out(1))
    model = AutoModelForImageTextToText.from_pretrained(demo.folder())
    processor = AutoProcessor.from_pretrained(demo.folder())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=item.picture, text=text, return_tensors="pt")
    handle = squeeze.apply(model, "fastv", ratio=0.5)

    def answer(ratio: float) -> str:
        # The block stands in the thread that generates.
        with handle.using(ratio=ratio) as call, torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        words = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return f"ratio {ratio:g}: {str(words).strip()} ({str(call.report()).splitlines()[0]})"

    print(f"question: {item.question}")
    with ThreadPoolExecutor(len(chosen.ratios)) as pool:
        print("\n".join(pool.map(answer, chosen.ratios)))
    handle.switch("divprune", ratio=0.5)
    print(answer(0.75))


if __name__ == "__main__":
    main()
