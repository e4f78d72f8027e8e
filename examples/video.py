"""A video through Qwen2.5-VL: every rule works on the frames of a video as it does on a picture.

python examples/video.py                                        # random weights: only the token counts mean something
python examples/video.py --model Qwen/Qwen2.5-VL-3B-Instruct --picture kept.png
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image
from tiny_qwen import model as random_model
from tiny_qwen import processor as random_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo

FRAMES = 8


def frames() -> list[Image.Image]:
    """A drawn picture that drifts to the right behind a part that stands still, as frames of 168 x 168 pixels."""
    still = np.asarray(next(demo.held_out(1)).picture)
    moving = [np.roll(still, 12 * t, axis=1) for t in range(FRAMES)]
    return [Image.fromarray(np.concatenate([still[:84], move[84:]])) for move in moving]


def main(arguments: list[str] | None = None) -> None:
    """Ask about a video, dense and squeezed, and print what the method removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; a tiny Qwen2.5-VL with random weights by default")
    parser.add_argument("--method", default="vidcom2")
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--picture", help="where to save a drawing of the tokens that were kept")
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    if options.model:
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
        processor = AutoProcessor.from_pretrained(options.model)
    else:
        print("No --model given: the weights are random, so read the token counts, not the answer.\n")
        processor = random_processor()
        model = random_model(processor.tokenizer)

    video = frames()
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is moving?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(videos=[np.stack(video)], text=[text], return_tensors="pt", do_sample_frames=False)
    inputs = inputs.to(model.device, model.dtype)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return str(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]).strip()

    print("dense:   ", answer())
    with squeeze.applied(model, options.method, ratio=options.ratio) as handle:
        print("squeezed:", answer())
        print()
        print(handle.report())
        span = handle.layout.spans[0]
        print(f"\nframes x height x width, in tokens: {span.grid}")
        if options.picture:
            from mllm_squeeze.reporting import pictures as viz

            viz.handle_figure(handle, video, options.picture)


if __name__ == "__main__":
    main()
