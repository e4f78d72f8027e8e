"""The words by which a config says what each decoder layer is, and what each of them means for a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm_squeeze.errors import UnsupportedModelError

Meaning = Literal["full", "windowed", "recurrent", "unsupported"]


@dataclass(frozen=True)
class LayerKind:
    """What a word says of a layer.

    meaning: "full" attends to all tokens, "windowed" to those near by position, "recurrent" keeps a state instead of
    entries token by token, "unsupported" cannot be cut exactly. window: config name of the window's size. why: for an
    unsupported one, what it does that a cut would change.
    """

    word: str
    meaning: Meaning
    window: str = ""
    why: str = ""


_INDEXER = "an indexer picks the keys of each query and caches keys of its own, which a cut does not shorten"
_BLOCKS = "its entries stand for blocks of neighbouring tokens, and a cut moves the blocks' borders"
_BOTH = "it keeps a recurrent state beside its attention"
_NO_ATTENTION = "it has no attention, and no model with such layers was tried"

_KINDS = (
    LayerKind("full_attention", "full"),
    LayerKind("sliding_attention", "windowed", window="sliding_window"),
    LayerKind("chunked_attention", "windowed", window="attention_chunk_size"),
    LayerKind("linear_attention", "recurrent"),
    LayerKind("conv", "recurrent"),
    # Words of configs from before they were renamed.
    LayerKind("attention", "full"),
    LayerKind("mamba", "recurrent"),
    LayerKind("recurrent", "recurrent"),
    LayerKind(
        "window_attention", "unsupported", why="its windows are counted by places in the sequence, which a cut changes"
    ),
    LayerKind("indexed_attention", "unsupported", why=_INDEXER),
    LayerKind("deepseek_sparse_attention", "unsupported", why=_INDEXER),
    LayerKind("qwen_sparse_attention", "unsupported", why=_INDEXER),
    LayerKind("compressed_sparse_attention", "unsupported", why=_BLOCKS),
    LayerKind("heavily_compressed_attention", "unsupported", why=_BLOCKS),
    LayerKind(
        "minimax_m3_sparse",
        "unsupported",
        why="it attends to blocks of keys that it picks by their places in the cache, which a cut changes",
    ),
    LayerKind("hybrid", "unsupported", why=_BOTH),
    LayerKind("hybrid_sliding", "unsupported", why=_BOTH),
    LayerKind(
        "reference_sliding_attention",
        "unsupported",
        why="it keeps the whole prompt beside a window over generated tokens, in a cache layer of its own",
    ),
    LayerKind("moe", "unsupported", why=_NO_ATTENTION),
    LayerKind("mlp", "unsupported", why=_NO_ATTENTION),
)

KINDS: dict[str, LayerKind] = {kind.word: kind for kind in _KINDS}
_FULL = KINDS["full_attention"]


def layer_kinds(config: Any, count: int) -> tuple[LayerKind, ...]:
    """Return what each decoder layer is.

    config: of the text model. count: number of its layers.

    Raises:
        UnsupportedModelError: a word is not known, or says what cannot be cut exactly, or their number is another one.
    """
    words = getattr(config, "layer_types", None)
    if words is None:
        return (_without_words(config),) * count
    words = [str(word) for word in words]
    if len(words) != count:
        raise UnsupportedModelError(
            f"The text model of '{config.model_type}' has {count} layers, and its config says of {len(words)} what "
            "they are (layer_types). Make the two agree."
        )
    _refuse_unknown(config, words)
    _refuse_unsupported(config, words)
    return tuple(KINDS[word] for word in words)


def windows(config: Any, kinds: Sequence[LayerKind]) -> list[int | None]:
    """Return for each decoder layer how many tokens it looks back, None where it sees all.

    config: of the text model. kinds: of its layers.

    Raises:
        UnsupportedModelError: a layer has a window, and the config does not say of what size.
    """
    # Configs look attributes up slowly, and most layers share theirs.
    shared = {name: getattr(config, name, None) for name in {kind.window for kind in kinds} if name}
    own = config.per_layer_config if getattr(config, "is_heterogeneous", False) else None
    found: list[int | None] = []
    for number, kind in enumerate(kinds):
        size = getattr(own[number], kind.window, None) if own is not None and kind.window else shared.get(kind.window)
        if kind.window and not isinstance(size, int):
            raise UnsupportedModelError(
                f"Layer {number} of the text model of '{config.model_type}' is '{kind.word}', and its config does not "
                f"say how many tokens it looks back: expected `{kind.window}` to be a number, found {size!r}."
            )
        found.append(size)
    return found


def _without_words(config: Any) -> LayerKind:
    """Return what all layers are where the config has no words: what the library's own caches take them for."""
    for kind in (KINDS["sliding_attention"], KINDS["chunked_attention"]):
        if isinstance(getattr(config, kind.window, None), int):
            return kind
    return _FULL


def _refuse_unknown(config: Any, words: Sequence[str]) -> None:
    unknown = sorted(set(words) - set(KINDS))
    if unknown:
        known = ", ".join(word for word, kind in KINDS.items() if kind.meaning != "unsupported")
        raise UnsupportedModelError(
            f"The config of '{config.model_type}' calls {_layers(words, unknown[0])} '{unknown[0]}', and it is not "
            f"known what a cut does to such a layer. Known are {known}. Use a newer mllm_squeeze, or ask for this kind."
        )


def _refuse_unsupported(config: Any, words: Sequence[str]) -> None:
    for word in dict.fromkeys(words):
        kind = KINDS[word]
        if kind.meaning == "unsupported":
            raise UnsupportedModelError(
                f"'{config.model_type}' cannot be cut exactly, as its config calls {_layers(words, word)} '{word}': of "
                f"such a layer it is known that {kind.why}. The model was left as it was."
            )


def _layers(words: Sequence[str], word: str) -> str:
    numbers = [number for number, found in enumerate(words) if found == word]
    if len(numbers) == len(words):
        return "all layers"
    shown = ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
    return f"layer{'s' if len(numbers) > 1 else ''} {shown}"
