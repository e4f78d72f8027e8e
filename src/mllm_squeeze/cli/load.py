"""Models, processors and prompts for the commands; imports torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from mllm_squeeze.errors import ConfigError, UnsupportedInputError, UnsupportedModelError

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def skeleton(name: str) -> Any:
    """Build a model from its config alone, on the meta device: no weights, no memory.

    Raises:
        UnsupportedModelError: there is no config, or it is not that of a multimodal model.
    """
    path = Path(name)
    try:
        config = AutoConfig.from_pretrained(str(path.parent if path.name == "config.json" else name))
        with torch.device("meta"):
            return AutoModelForMultimodalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, error) from error


def model(name: str, device: str | None = None, dtype: str = "auto") -> Any:
    """Load a model with its weights, for inference.

    Raises:
        ConfigError: an unknown dtype. UnsupportedModelError: it cannot be loaded.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(_DTYPES)}; got '{dtype}'.")
    try:
        loaded = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, error) from error
    try:
        return loaded.to(device or best_device()).eval()
    except RuntimeError as error:
        raise ConfigError(f"The device '{device}' cannot be used: {_first_line(error)}") from error


def best_device() -> str:
    """Return "cuda" or "mps" where there is one, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processor(name: str) -> Any:
    """Load the processor of a model; raises UnsupportedModelError where it has none."""
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(name, error) from error


def prompt(reader: Any, text: str, images: list[Path], videos: list[Path], frames: int | None) -> Any:
    """Return the inputs of one question about some pictures and videos, in the model's chat format.

    Raises:
        UnsupportedInputError: a file is missing, or the processor takes no chat or no such files.
    """
    for path in [*images, *videos]:
        if not path.is_file():
            raise UnsupportedInputError(f"There is no file {path}.")
    if not images and not videos:
        raise UnsupportedInputError("Give at least one --image or --video: without one there is nothing to squeeze.")
    content = [{"type": "image", "path": str(path)} for path in images]
    content += [{"type": "video", "path": str(path)} for path in videos]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    sampling = {} if frames is None or not videos else {"num_frames": frames}
    try:
        return reader.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **sampling
        )
    except (ValueError, TypeError, KeyError, OSError, ImportError, AttributeError) as error:
        raise UnsupportedInputError(f"The model's processor refuses this prompt: {_first_line(error)}") from error


def _not_loaded(name: str, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"'{name}' cannot be loaded as a multimodal model: {_first_line(error)} Give the folder of a HuggingFace "
        "model, or a hub id that can be reached from here."
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
