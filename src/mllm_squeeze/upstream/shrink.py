"""A config of the same kind as another with few layers, few heads and few words: every kind of layer is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 256
# Shorter than the prompt that is tried, so that it matters.
WINDOW = 12
_INNER = 64
_INNER_NAMES = ("ffn_dim", "moe_hidden_size")
_ENCODER_LAYERS = 2
Values = dict[str, Any]


def shrink(config: Any, narrow: bool) -> tuple[Any, tuple[str, ...]]:
    """Return a small config of the class of a text model's, and what was made smaller in it, in words.

    narrow: shrink the width too, head size aside.
    """
    values: Values = config.to_dict()
    values.pop("quantization_config", None)
    shrunk = [_fewer_layers(values, config), _small_vocabulary(values), _short_window(values)]
    shrunk += [_narrower(values, config)] if narrow else []
    _fewer_encoder_layers(values)
    return type(config).from_dict(values), tuple(words for words in shrunk if words)


def _name(config: Any, standard: str) -> str:
    return str(config.attribute_map.get(standard, standard))


# Depth


def _fewer_layers(values: Values, config: Any) -> str:
    name = _name(config, "num_hidden_layers")
    count = int(values[name])
    chosen, borrowing = _choose_layers(values, count)
    if len(chosen) == count:
        return ""
    values[name] = len(chosen)
    if borrowing:
        values["num_kv_shared_layers"] = borrowing
    for key, value in values.items():
        if _names_layers(key, value, count):
            values[key] = [chosen.index(number) for number in value if number in chosen]
        elif isinstance(value, list) and len(value) == count:
            values[key] = [value[number] for number in chosen]
    own = values.get("per_layer_config")
    if isinstance(own, Mapping):
        # Keys are numbers as text ("05"), or names of layer types.
        by_number = {int(key): value for key, value in own.items() if str(key).isdigit()}
        values["per_layer_config"] = {key: value for key, value in own.items() if not str(key).isdigit()} | {
            place: by_number[number] for place, number in enumerate(chosen) if number in by_number
        }
    return f"{len(chosen)} of {count} layers"


def _choose_layers(values: Values, count: int) -> tuple[list[int], int]:
    """Return the first layer and as few others as show every kind, and how many of those borrow keys and values."""
    kinds = _kinds(values, count)
    borrowing = int(values.get("num_kv_shared_layers") or 0)
    own = count - borrowing
    end = max(_until_all(kinds, 1, own), min(3, own))
    last = _until_all(kinds, own, count)
    return [*range(end), *range(own, last)], last - own


def _until_all(kinds: list[tuple[Any, ...]], start: int, stop: int) -> int:
    """Return the first end at which kinds[start:end] holds every kind of kinds[start:stop]."""
    wanted = set(kinds[start:stop])
    return next((end for end in range(start, stop) if set(kinds[start:end]) == wanted), stop)


def _kinds(values: Values, count: int) -> list[tuple[Any, ...]]:
    """Return what the config says of each layer by its number."""
    columns: list[list[Any]] = []
    for key, value in values.items():
        if _names_layers(key, value, count):
            columns.append([number in value for number in range(count)])
        elif isinstance(value, list) and len(value) == count and all(type(x) in (str, bool, int) for x in value):
            columns.append(value)
    return [tuple(column[number] for column in columns) for number in range(count)]


def _names_layers(key: str, value: Any, count: int) -> bool:
    """True for a list of layer numbers, such as `moe_layers`; False for a list with one entry per layer."""
    if not isinstance(value, list) or not value or "token" in key:
        return False
    return all(type(x) is int and 0 <= x < count for x in value) and len(set(value)) == len(value)


# Width


def _narrower(values: Values, config: Any) -> str:
    """Take few heads of the same size, and a hidden size that they fill."""
    hidden_name, heads_name = _name(config, "hidden_size"), _name(config, "num_attention_heads")
    hidden, heads = int(values[hidden_name]), int(values[heads_name])
    lent = int(values.get("num_key_value_heads") or heads)
    lenders = min(lent, 2)
    few = lenders * min(heads // lent, 2)
    width = int(values.get("head_dim") or hidden // heads) * few
    if width >= hidden:
        return ""
    for key, value in values.items():
        if key == hidden_name or (value == hidden and key.endswith(("_dim", "_size"))):
            values[key] = width
        elif key in _INNER_NAMES or "intermediate" in key:
            values[key] = [min(x, _INNER) for x in value] if isinstance(value, list) else value and min(value, _INNER)
    for part in (values, *(values.get("per_layer_config") or {}).values()):
        for key, value in part.items():
            if key.endswith("key_value_heads") and value:
                part[key] = min(value, lenders)
            elif key == heads_name:
                part[key] = few
    return f"hidden size {width} of {hidden}"


# The rest


def _small_vocabulary(values: Values) -> str:
    before = values.get("vocab_size")
    for key, value in values.items():
        if "vocab_size" in key and isinstance(value, int):
            values[key] = min(value, VOCABULARY)
        elif key.endswith("token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            inside = [min(number, VOCABULARY - 1) for number in ids]
            values[key] = inside if isinstance(value, list) else inside[0]
    return f"vocabulary {VOCABULARY} of {before}" if before and before > VOCABULARY else ""


def _short_window(values: Values) -> str:
    before = values.get("sliding_window")
    if not isinstance(before, int) or before <= WINDOW:
        return ""
    values["sliding_window"] = WINDOW
    return f"sliding window {WINDOW} of {before}"


def _fewer_encoder_layers(values: Values) -> None:
    """Shrink encoders inside of a text model (Phi-4), which a prompt of embeddings never enters."""
    for part in values.values():
        if not isinstance(part, dict):
            continue
        for key in ("num_hidden_layers", "num_blocks"):
            if isinstance(part.get(key), int):
                part[key] = min(part[key], _ENCODER_LAYERS)
