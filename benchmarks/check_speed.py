"""How long `squeeze.check` takes where many methods are there: copies of those that ship, under other names.

python benchmarks/check_speed.py [--methods 80]

The model is a small LLaVA of random weights. Printed are the milliseconds of the first check, which reads all the
recipes, and of the next ones, which find them read. Nothing is asserted: times depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import transformers
from torch import nn

import mllm_squeeze as squeeze
from mllm_squeeze import registry


def small_llava() -> nn.Module:
    """Return a LLaVA of four layers and random weights."""
    text = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=127)
    return transformers.LlavaForConditionalGeneration(config).eval()


def copies(count: int, folder: Path) -> None:
    """Register copies of the methods that ship until there are `count` methods."""
    paths = sorted(registry.configs_dir().glob("*.yaml"))
    for number in range(count - len(registry.method_names())):
        path = paths[number % len(paths)]
        name = f"{path.stem}_{number}"
        copy = folder / f"{name}.yaml"
        copy.write_text(path.read_text(encoding="utf-8").replace(f"method: {path.stem}", f"method: {name}"))
        registry.add_method(name, copy)  # register_method would read it, and that is what is measured


def milliseconds(model: nn.Module) -> float:
    """Return how long one check takes."""
    start = time.perf_counter()
    squeeze.check(model)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", type=int, default=80, help="how many methods there are")
    parser.add_argument("--repeats", type=int, default=7, help="checks after the first")
    given = parser.parse_args()
    model = small_llava()
    registry.method_names()
    squeeze.describe("random")  # imports what reads a recipe
    with tempfile.TemporaryDirectory() as folder:
        copies(given.methods, Path(folder))
        first = milliseconds(model)
        later = statistics.median(milliseconds(model) for _ in range(given.repeats))
    print(f"{given.methods} methods, first check:            {first:5.0f} ms")
    print(f"{given.methods} methods, median of {given.repeats} later ones: {later:5.0f} ms")


if __name__ == "__main__":
    main()
