"""Questions with one-word answers about a picture; every one names exactly one thing, or asks for a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from .pictures import COLOURS, DIGITS, MANY, PLACES, SHAPES, Scene, Thing, draw

KINDS = ("colour", "shape", "digit", "place", "count")
SHARES = {"colour": 0.24, "shape": 0.24, "digit": 0.24, "place": 0.2, "count": 0.08}
MOST = 5

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is {}?",
        "Which colour is {}?",
        "What is the colour of {}?",
        "What color is {}?",
        "Tell me the colour of {}.",
    ),
    "shape": (
        "What shape is {}?",
        "Which shape is {}?",
        "What is the shape of {}?",
        "Tell me the shape of {}.",
    ),
    "digit": (
        "Which digit is in {}?",
        "What digit is in {}?",
        "What number is on {}?",
        "Read the digit in {}.",
    ),
    "place": (
        "Where is {}?",
        "Where in the picture is {}?",
        "In which part of the picture is {}?",
        "Tell me where {} is.",
    ),
    "count": (
        "How many {} are there?",
        "How many {} are in the picture?",
        "Count the {}.",
        "Tell me how many {} there are.",
    ),
}
_REFERENTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("colour",): ("the {colour} one", "the {colour} thing"),
    ("shape",): ("the {shape}",),
    ("digit",): ("the {digit}", "the thing with the {digit}"),
    ("colour", "shape"): ("the {colour} {shape}",),
    ("colour", "digit"): ("the {colour} {digit}", "the {colour} thing with the {digit}"),
    ("shape", "digit"): ("the {shape} with the {digit}", "the {shape} with a {digit}"),
}
_PLURALS = {"colour": ("{} ones", "{} things"), "shape": ("{}",)}


@dataclass(frozen=True)
class Question:
    """A question, its answer and kind, which things of the scene bear on it, and by which keys it names them."""

    text: str
    answer: str
    kind: str
    things: tuple[int, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One held-out example: a picture, a question about it with its answer and kind, and what is in the picture."""

    picture: Image.Image
    question: str
    answer: str
    kind: str
    things: tuple[int, ...]
    scene: Scene


def words() -> list[str]:
    """Every word and mark that a question or an answer can hold, lower case, sorted."""
    texts = [template.replace("{}", " ") for templates in _TEMPLATES.values() for template in templates]
    nouns = [noun for referents in _REFERENTS.values() for noun in referents]
    texts += [noun.format(colour=" ", shape=" ", digit=" ") for noun in nouns] + ["ones things"]
    found = {word for text in texts for word in text.replace("?", " ? ").replace(".", " . ").lower().split()}
    return sorted(found | set(COLOURS) | set(SHAPES) | set(map(_plural, SHAPES)) | set(DIGITS) | set(PLACES))


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _values(thing: Thing, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(getattr(thing, key)) for key in keys)


def referents(scene: Scene) -> list[tuple[int, tuple[str, ...]]]:
    """All pairs (thing, keys) such that the words of the thing for these keys fit no other thing of the scene."""
    found = []
    for keys in _REFERENTS:
        counts = Counter(_values(thing, keys) for thing in scene.things)
        found += [(i, keys) for i, thing in enumerate(scene.things) if counts[_values(thing, keys)] == 1]
    return found


def _about_one(
    scene: Scene, kind: str, unique: list[tuple[int, tuple[str, ...]]], rng: np.random.Generator
) -> Question:
    """A question for the `kind` word of one thing; for a number where no thing can be named without that word."""
    usable = [(i, keys) for i, keys in unique if kind not in keys]
    if not usable:
        return _how_many(scene, rng)
    index, keys = usable[int(rng.integers(len(usable)))]
    thing = scene.things[index]
    noun = _pick(_REFERENTS[keys], rng).format(colour=thing.colour, shape=thing.shape, digit=thing.digit)
    return Question(_pick(_TEMPLATES[kind], rng).format(noun), str(getattr(thing, kind)), kind, (index,), keys)


def _how_many(scene: Scene, rng: np.random.Generator) -> Question:
    """A question for the number of things of one colour or shape, at most MOST."""
    counts = Counter((key, getattr(thing, key)) for thing in scene.things for key in _PLURALS)
    asked = list(product(["colour"], COLOURS)) + list(product(["shape"], SHAPES))
    by_number: dict[int, list[tuple[str, str]]] = {}
    for pair in asked:
        by_number.setdefault(counts[pair], []).append(pair)
    # Small numbers are far more frequent in a picture: the number is drawn first, so that guessing does not pay.
    number = int(rng.choice([n for n in sorted(by_number) if n <= MOST]))
    key, value = by_number[number][int(rng.integers(len(by_number[number])))]
    things = tuple(i for i, thing in enumerate(scene.things) if getattr(thing, key) == value)
    text = _pick(_TEMPLATES["count"], rng).format(
        _pick(_PLURALS[key], rng).format(_plural(value) if key == "shape" else value)
    )
    return Question(text, str(number), "count", things, (key,))


def ask(
    scene: Scene, rng: np.random.Generator, count: int = 1, shares: dict[str, float] | None = None
) -> list[Question]:
    """`count` questions about a scene, their kinds drawn by `shares` (kind -> weight)."""
    shares = shares or SHARES
    unique = referents(scene)
    weights = np.array(list(shares.values()))
    kinds = rng.choice(list(shares), count, p=weights / weights.sum())
    return [_how_many(scene, rng) if kind == "count" else _about_one(scene, str(kind), unique, rng) for kind in kinds]


def held_out(n: int, seed: int = 1, shares: dict[str, float] | None = None) -> Iterator[Item]:
    """`n` examples at full difficulty, one question to a picture; the same each time, and never trained on."""
    # Training draws from streams [0, seed, stage, step]; a first word of 1 keeps these apart from all of them.
    rng = np.random.default_rng([1, seed])
    for _ in range(n):
        picture, scene = draw(rng, MANY)
        question = ask(scene, rng, shares=shares)[0]
        yield Item(picture, question.text, question.answer, question.kind, question.things, scene)
