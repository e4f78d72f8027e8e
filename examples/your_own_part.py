"""A part of your own, one class and one registration, in a method that is YAML: no other code.

python examples/your_own_part.py
python examples/your_own_part.py --model llava-hf/llava-1.5-7b-hf
"""

from __future__ import annotations

import argparse

from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_squeeze as squeeze
from mllm_squeeze import demo
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.reducers.base import VisualTokens


class Centre(Score):
    """Score a token by how near it is to the middle of its picture; needs a grid.

    power: 2 is the Euclidean distance, 1 counts rows and columns.
    """

    power: int = 2

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return float32 (S, N)."""
        place = tokens.grid[..., 2:].float()
        middle = place.amax(1, keepdim=True) / 2
        return -(place - middle).norm(p=self.power, dim=-1)


# In a package of your own this is an entry point, see docs/add_a_method.md.
METHOD = {
    "method": "centred",
    "summary": "Keep what is near the middle of the picture, and an even sample of the rest.",
    "params": {"ratio": 0.75},
    "steps": [
        {
            "at": "projector",
            "ratio": "${ratio}",
            "score": {"centre": {"power": 1}},
            "select": {"in_turn": [{"select": "top_k", "share": 0.5}, {"select": "stride"}]},
        }
    ],
}


def main(arguments: list[str] | None = None) -> None:
    """Register the part and the method, and look at what the method keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.folder(), help="a checkpoint; the tiny model in the box by default")
    parser.add_argument("--device", default="cpu", help="cuda for a real model")
    options = parser.parse_args(arguments)

    squeeze.register_part("centre", Centre)
    squeeze.register_method("centred", METHOD)

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    item = next(demo.held_out(1))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=item.picture, text=text, return_tensors="pt").to(model.device, model.dtype)

    with squeeze.applied(model, "centred", ratio=0.75) as handle:
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{item.question} {answer} (right: {item.answer})\n")
        print(handle.report())

    # A rule runs without a model as well: here on a grid of 8 x 8.
    print("kept of 8 x 8:", squeeze.choose("centred", grid=(8, 8), ratio=0.9).kept.tolist())


if __name__ == "__main__":
    main()
