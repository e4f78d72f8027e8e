"""Models, processors and prompts for the commands; imports torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from mllm_squeeze.errors import ConfigError, UnsupportedInputError, UnsupportedModelError, closest

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def skeleton(name: str) -> Any:
    """Build a model from its config alone, on the meta device: no weights, no memory.

    name: a folder, a config.json, a hub id, or a model type like "qwen2_5_vl", whose config is its class's default.

    Raises:
        UnsupportedModelError: there is no config, or it is not that of a multimodal model.
    """
    path = Path(name)
    if not path.exists() and name in CONFIG_MAPPING:
        return _default(name)
    try:
        config = AutoConfig.from_pretrained(str(path.parent if path.name == "config.json" else name))
        with torch.device("meta"):
            return AutoModelForMultimodalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, error, f" A model type does as well.{closest(name, CONFIG_MAPPING)}") from error


def _default(model_type: str) -> Any:
    """Build a model of a type from the defaults of its config."""
    try:
        with torch.device("meta"):
            return AutoModelForMultimodalLM.from_config(AutoConfig.for_model(model_type))
    except Exception as error:  # defaults that do not go together fail in any way
        raise UnsupportedModelError(
            f"The model type '{model_type}' cannot be built as a multimodal model from the defaults of its config: "
            f"{_stopped(_first_line(error))} Give the folder of such a model, its config.json or its hub id."
        ) from error


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


def processor(name: str, **settings: Any) -> Any:
    """Load the processor of a model; raises UnsupportedModelError where it has none."""
    try:
        return AutoProcessor.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(name, error) from error


def prompt(reader: Any, text: str, images: list[Path], videos: list[Path], frames: int | None) -> Any:
    """Return the inputs of one question about some pictures and videos, in the model's chat format.

    Raises:
        UnsupportedInputError: a file is missing, or the processor takes no chat or no such files.
    """
    return prompts(reader, [(text, images, videos)], frames)


def prompts(reader: Any, asked: list[tuple[str, list[Path], list[Path]]], frames: int | None) -> Any:
    """Return the inputs of several questions, (text, images, videos) each, as one batch; raises like `prompt`."""
    chats = [_content(*one) for one in asked]
    files = [path for _, images, videos in asked for path in [*images, *videos]]
    more: dict[str, Any] = {} if frames is None or not any(videos for _, _, videos in asked) else {"num_frames": frames}
    if len(chats) > 1:
        more["processor_kwargs"] = {"padding": True}
    try:
        for content in chats:
            _check_seen(reader, content)
        return reader.apply_chat_template(
            [_chat(content) for content in chats] if len(chats) > 1 else _chat(chats[0]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **more,
        )
    except UnsupportedInputError:
        raise
    except (ValueError, TypeError, KeyError, OSError, ImportError, AttributeError, RuntimeError) as error:
        given = ", ".join(map(str, files))
        raise UnsupportedInputError(
            f"The model's processor refuses this prompt with {given}: {_first_line(error)}"
        ) from error


def _content(text: str, images: list[Path], videos: list[Path]) -> list[dict[str, Any]]:
    """Return the parts of one question in the chat format."""
    for path in [*images, *videos]:
        if not path.is_file():
            raise UnsupportedInputError(f"There is no file {path}.")
    if not images and not videos:
        raise UnsupportedInputError("Give at least one --image or --video: without one there is nothing to squeeze.")
    content: list[dict[str, Any]] = [{"type": "image", "image": _picture(path)} for path in images]
    content += [{"type": "video", "path": str(path)} for path in videos]
    return [*content, {"type": "text", "text": text}]


def _picture(path: Path) -> Image.Image:
    """Return the pixels of a picture, upright."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnsupportedInputError(
            f"{path} is no picture that can be read: {_stopped(_first_line(error))} Give a PNG, JPEG or WebP file; "
            "films go to --video."
        ) from error


def _chat(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _check_seen(reader: Any, content: list[dict[str, Any]]) -> None:
    """Raise UnsupportedInputError where the prompt would be the same without its pictures, or without its videos."""
    asked = reader.apply_chat_template(_chat(content), add_generation_prompt=True, tokenize=False)
    for kind in sorted({part["type"] for part in content} - {"text"}):
        rest = [part for part in content if part["type"] != kind]
        unseen = reader.apply_chat_template(_chat(rest), add_generation_prompt=True, tokenize=False) == asked
        if unseen or (kind == "video" and getattr(reader, "video_processor", None) is None):
            raise UnsupportedInputError(
                f"This model takes no {kind}: its processor leaves out what --{kind} gives, and the answer would be "
                f"without it. Leave --{kind} out, or take a model for {kind}s."
            )


def _not_loaded(name: str, error: Exception, more: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"'{name}' cannot be loaded as a multimodal model: {_stopped(_first_line(error))} Give the folder of a "
        f"HuggingFace model, or a hub id that can be reached from here.{more}"
    )


def _stopped(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
