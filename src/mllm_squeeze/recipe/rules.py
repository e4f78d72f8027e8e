"""The rules that numbers and keys of a recipe must follow, and the sentences that say which one was broken."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mllm_squeeze.errors import did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Strict(BaseModel):
    """Plain data that stays as it was checked; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_layers(layers: Sequence[int | float] | None) -> None:
    """Raise ValueError unless each layer is an index or a fraction of the depth, and they ascend."""
    if layers is None:
        return
    if not layers:
        raise ValueError("layers is empty; name at least one layer")
    for layer in layers:
        if layer < 0 or (isinstance(layer, float) and not 0 < layer < 1):
            raise ValueError(
                "a layer is a zero-based index (an int, at least 0) or a fraction of the depth (a float above 0, "
                f"below 1); got {layer}"
            )
    for earlier, later in pairwise(layers):
        if type(earlier) is type(later) and later <= earlier:
            raise ValueError(f"layers must ascend; got {list(layers)}")


def explain(
    error: ValidationError,
    where: str,
    model: type[BaseModel],
    given: Mapping[str, Any],
    also: Iterable[str] = (),
    hide: Iterable[str] = (),
) -> str:
    """Return one sentence per problem: the file and step, the key, what was given and what is allowed."""
    allowed = [*(name for name in model.model_fields if name not in set(hide)), *also]
    out: dict[str, list[str]] = {}
    for item in error.errors():
        key = _key(item["loc"])
        sentence = _sentence(item, key, _allowed(model, item["loc"], allowed), given)
        if sentence not in out.setdefault(key, []):
            out[key].append(sentence)
    return f"{where}: " + " ".join(_stop("; or ".join(sentences)) for sentences in out.values())


def _key(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key without the member names that pydantic adds for unions, like 'at.layer' and 'layers.1'."""
    return ".".join(str(part) for part in loc if part not in ("int", "float", "literal['all']"))


def _allowed(model: type[BaseModel], loc: tuple[int | str, ...], allowed: list[str]) -> list[str]:
    """Return the keys that may stand where `loc` points."""
    if len(loc) < 2:
        return allowed
    field = model.model_fields.get(str(loc[0]))
    for kind in (field.annotation, *get_args(field.annotation)) if field is not None else ():
        if hasattr(kind, "model_fields"):
            return list(kind.model_fields)
    return allowed


def _sentence(item: ErrorDetails, key: str, allowed: list[str], given: Mapping[str, Any]) -> str:
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key '{key}'. {did_you_mean(str(item['loc'][-1]), allowed)}"
    if kind == "missing":
        inside = given.get(str(item["loc"][0]), given) if len(item["loc"]) > 1 else given
        typo = difflib.get_close_matches(str(item["loc"][-1]), map(str, inside), n=1)
        return f"the key '{key}' is missing" + (f"; '{typo[0]}' looks like it" if typo else "")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[:1].lower()}{message[1:]}, got {item['input']!r}{_closest(item['input'], message)}"


def _closest(given: object, message: str) -> str:
    """Return a hint where the message lists quoted words and the given one is close to one of them."""
    words = re.findall(r"'([^']+)'", message)
    close = difflib.get_close_matches(given, words, n=1) if isinstance(given, str) else []
    return f". Did you mean '{close[0]}'?" if close else ""


def _stop(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."
