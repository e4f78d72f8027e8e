"""Methods side by side on one picture, each against the dense model through `handle.disabled()`.

python examples/compare_methods.py
python examples/compare_methods.py --model llava-hf/llava-1.5-7b-hf --keep 64 --picture kept.png
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo


def main(arguments: list[str] | None = None) -> None:
    """Print the answer and the cost of each method; draw what the last one kept if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.folder(), help="a checkpoint; the tiny model in the box by default")
    parser.add_argument("--methods", nargs="+", default=["random", "fastv", "visionzip", "divprune"])
    parser.add_argument("--keep", type=int, default=49, help="visual tokens that are left of each picture")
    parser.add_argument("--picture", help="where to save a drawing of the tokens that the last method kept")
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    item = next(demo.held_out(1, seed=5))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=item.picture, text=text, return_tensors="pt").to(model.device, model.dtype)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return str(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    print(f"{item.question} (right: {item.answer})\n")
    print(f"{'method':<12} {'tokens':>6} {'FLOPs':>7}  {'answer':<14} dense answer")
    for method in options.methods:
        with squeeze.applied(model, method, keep=options.keep) as handle:
            squeezed = answer()
            report = handle.report()
            cost = f"{100 * report.flops / report.flops_dense:.0f} %" if report.flops and report.flops_dense else "-"
            if options.picture and method == options.methods[-1]:
                from mllm_squeeze.reporting import pictures as viz

                viz.handle_figure(handle, item.picture, options.picture)
            with handle.disabled():
                dense = answer()
        print(f"{method:<12} {report.visual_after:>6} {cost:>7}  {squeezed:<14} {dense}")


if __name__ == "__main__":
    main()
