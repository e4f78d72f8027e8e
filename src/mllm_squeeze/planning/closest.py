"""Names the methods that fit a model where another one does not, the closest first, from the facts of their recipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_squeeze.errors import SqueezeError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.planning.fit import why_not
from mllm_squeeze.recipe.recipe import Recipe, facts, load_recipe
from mllm_squeeze.reducers.needs import (
    Attention,
    EncoderAttention,
    EncoderProjection,
    EncoderStates,
    Features,
    Projection,
    Rotary,
    Size,
    States,
)
from mllm_squeeze.registry import method_names

_MOST = 3
# Names of signals, as facts say them. States at the place of the cut, and sizes, are there wherever a method acts.
_OF_THE_ENCODER = frozenset(kind.__name__ for kind in (EncoderAttention, EncoderProjection, EncoderStates))
_OF_THE_LLM = frozenset(kind.__name__ for kind in (Attention, Projection, Rotary, States))
_EVERYWHERE = frozenset(kind.__name__ for kind in (Features, Size))
# Facts that an error asks to do without, as the signals that they stand for.
_AVOIDED = {
    "attention": _OF_THE_LLM | _OF_THE_ENCODER,
    "attention of the LLM": _OF_THE_LLM,
    "encoder attention": _OF_THE_ENCODER,
    "rotary angles": frozenset({Rotary.__name__}),
    "text": frozenset({"text"}),
}


@contextmanager
def naming_others(recipe: Recipe, parts: ModelParts) -> Iterator[None]:
    """Add to an error that leaves the block which methods fit the model, where another method is a way out."""
    try:
        yield
    except SqueezeError as error:
        if error.avoid is not None:
            error.args = (f"{error} {_sentence(closest_methods(recipe, parts, error.avoid))}",)
        raise


def closest_methods(recipe: Recipe, parts: ModelParts, avoid: frozenset[str] = frozenset()) -> list[str]:
    """Return the names of at most three other methods that fit a model, those that are most like `recipe` first.

    avoid: what they must not read, as `SqueezeError.avoid` says it. Methods are alike that act at the same kinds of
    places, then those for the same modalities, then those of a paper, as baselines are like anything, then by what
    they read and whether their count is known.
    """
    unread = frozenset[str]().union(*(_AVOIDED[word] for word in avoid))
    wanted = facts(recipe)
    found = []
    for name in method_names():
        other = _loaded(name)
        if other is None or other.method == recipe.method or why_not(other, parts) is not None:
            continue
        told = facts(other)
        if not unread & _read(told):
            found.append((_distance(wanted, told, baseline=other.paper is None), name))
    return [name for _, name in sorted(found)[:_MOST]]


def _loaded(name: str) -> Recipe | None:
    """Return the recipe of a method with its default parameters, None where it is broken or lacks one."""
    try:
        return load_recipe(name)
    except SqueezeError:
        return None


def _distance(wanted: dict[str, Any], told: dict[str, Any], baseline: bool) -> tuple[int, ...]:
    return (
        len(_places(wanted) ^ _places(told)),
        len(set(wanted["modalities"]) ^ set(told["modalities"])),
        baseline,
        len(_read(wanted) ^ _read(told)),
        wanted["known_count"] != told["known_count"],
    )


def _read(told: dict[str, Any]) -> frozenset[str]:
    return frozenset([*told["signals"], *(["text"] if told["reads_text"] else [])]) - _EVERYWHERE


def _places(told: dict[str, Any]) -> frozenset[str]:
    """Return the kinds of places of a method; the keys of a picture stand where the projector does."""
    return frozenset("projector" if kind == "keys" else kind for kind in told["acts_in"])


def _sentence(names: list[str]) -> str:
    if not names:
        return "No other method that is known here fits this model; squeeze.check(model) says why."
    return f"Methods that fit this model, the closest first: {', '.join(names)}."
