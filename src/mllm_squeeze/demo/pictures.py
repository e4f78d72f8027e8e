"""Seeded pictures of coloured shapes with a digit in each, over textured and noisy backgrounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

PATCH = 12
GRID = 14
SIDE = PATCH * GRID
MANY = (12, 14)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (243, 134, 28),
    "yellow": (240, 220, 50),
    "green": (44, 160, 60),
    "blue": (40, 90, 220),
    "purple": (126, 50, 170),
    "pink": (246, 130, 190),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart")
DIGITS = tuple("0123456789")
PLACES = (
    "top-left",
    "top",
    "top-right",
    "left",
    "centre",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
BACKGROUNDS = ("plain", "stripes", "checks", "clouds")

_SIZES = (23, 24, 25)
_JITTER = 1
_PLACE_MARGIN = 2
_WHITE_INK = frozenset({"red", "green", "blue", "purple"})
_GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}


@dataclass(frozen=True)
class Thing:
    """One shape in a picture: its words, and its box (left, top, right, bottom) in pixels, the last two excluded."""

    colour: str
    shape: str
    digit: str
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        """The word for the ninth of the picture that holds the centre of the box."""
        left, top, right, bottom = self.box
        column = 3 * (left + right) // (2 * SIDE)
        row = 3 * (top + bottom) // (2 * SIDE)
        return PLACES[3 * row + column]


@dataclass(frozen=True)
class Scene:
    """What is in a picture: its things in drawing order, and the kind of background."""

    things: tuple[Thing, ...]
    background: str

    def patches(self, index: int, cover: float = 0.35) -> list[int]:
        """The visual tokens (row-major, 0 to 195) of which thing `index` covers at least `cover` of the area."""
        return [int(i) for i in np.flatnonzero(coverage(self.things[index]).ravel() >= cover)]


def coverage(thing: Thing) -> np.ndarray:
    """The share of each patch that the thing covers, float [GRID, GRID]."""
    left, top, right, _ = thing.box
    row, column = top // PATCH, left // PATCH
    window = _window(thing.shape, right - left, left % PATCH, top % PATCH)[: GRID - row, : GRID - column]
    cover = np.zeros((GRID, GRID), dtype=np.float32)
    cover[row : row + window.shape[0], column : column + window.shape[1]] = window
    return cover


@lru_cache(maxsize=4096)
def _window(shape: str, size: int, left: int, top: int) -> np.ndarray:
    """The shares that a shape covers of 4 x 4 patches when it lies `left` and `top` pixels into the first."""
    canvas = np.zeros((4 * PATCH, 4 * PATCH), dtype=np.float32)
    canvas[top : top + size, left : left + size] = np.asarray(_shape_mask(shape, size), dtype=np.float32) / 255
    shares: np.ndarray = canvas.reshape(4, PATCH, 4, PATCH).mean(axis=(1, 3))
    return shares


def _outline(shape: str, side: float) -> list[tuple[float, float]]:
    """The corners of a shape with straight edges in a square of the given side."""
    if shape == "square":
        unit = [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    elif shape == "triangle":
        unit = [(0.5, 0.0), (1.0, 0.96), (0.0, 0.96)]
    elif shape == "diamond":
        unit = [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]
    elif shape == "cross":
        a, b = 0.27, 0.73
        unit = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    elif shape == "star":
        turns = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 0.54, 0.28)
        unit = [(0.5 + r * np.sin(t), 0.54 - r * np.cos(t)) for r, t in zip(radii, turns, strict=True)]
    else:
        raise ValueError(f"no straight-edged shape {shape!r}")
    return [(float(x) * side, float(y) * side) for x, y in unit]


@lru_cache(maxsize=64)
def _shape_mask(shape: str, size: int) -> Image.Image:
    """The smooth mask (mode L, size x size) of a shape; drawn four times larger, since PIL does not smooth edges."""
    side = 4 * size
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0.02 * side, 0.02 * side, 0.98 * side, 0.98 * side), fill=255)
    elif shape == "heart":
        pen.ellipse((0.0, 0.04 * side, 0.54 * side, 0.58 * side), fill=255)
        pen.ellipse((0.46 * side, 0.04 * side, side - 1, 0.58 * side), fill=255)
        pen.polygon([(0.05 * side, 0.44 * side), (0.95 * side, 0.44 * side), (0.5 * side, 0.99 * side)], fill=255)
    else:
        pen.polygon(_outline(shape, side), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


@lru_cache(maxsize=16)
def _digit_mask(digit: str) -> Image.Image:
    """The mask (mode L, 10 x 14) of a digit."""
    rows = [[255 * int(dot) for dot in row] for row in _GLYPHS[digit].split()]
    return Image.fromarray(np.array(rows, dtype=np.uint8)).resize((10, 14), Image.Resampling.NEAREST)


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """Noise to cut pieces from, float [4 * SIDE, 4 * SIDE, 3], since drawing it afresh is the slow part."""
    return np.random.default_rng(7).normal(0, 9, (4 * SIDE, 4 * SIDE, 3)).astype(np.float32)


@lru_cache(maxsize=1)
def _mesh() -> np.ndarray:
    """The row and the column of every pixel, float [2, SIDE, SIDE]."""
    return np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A muted texture with noise, uint8 [SIDE, SIDE, 3]."""
    base = rng.uniform(95, 165) + rng.uniform(-14, 14, 3)
    y, x = _mesh()
    if kind == "plain":
        angle = rng.uniform(0, 2 * np.pi)
        wave = (np.cos(angle) * x + np.sin(angle) * y) / SIDE
    elif kind == "stripes":
        angle, width = rng.uniform(0, np.pi), rng.uniform(5, 11)
        wave = np.sign(np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / (2 * width)))
    elif kind == "checks":
        width = int(rng.integers(6, 13))
        wave = 1 - 2 * ((x // width + y // width) % 2)
    else:
        coarse = rng.uniform(-1.6, 1.6, (8, 8)).astype(np.float32)
        wave = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    top, left = rng.integers(0, 3 * SIDE, 2)
    noise = _noise()[top : top + SIDE, left : left + SIDE]
    field = wave.astype(np.float32)[..., None] * np.float32(rng.uniform(10, 18)) + base.astype(np.float32) + noise
    texture: np.ndarray = np.clip(field, 0, 255).astype(np.uint8)
    return texture


def _free_box(taken: list[tuple[int, int, int, int]], rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """A box clear of those taken, its centre off the borders between the nine places; None after many tries."""
    for _ in range(60):
        size = int(rng.choice(_SIZES))
        # Roughly on the patches: with any offset, the tower could read one digit in five after 370 steps.
        left, top = (int(v) for v in PATCH * rng.integers(0, GRID - 1, 2) + rng.integers(-_JITTER, _JITTER + 1, 2))
        left, top = min(max(left, 0), SIDE - size), min(max(top, 0), SIDE - size)
        centres = (left + size // 2, top + size // 2)
        if any(abs(c - border) < _PLACE_MARGIN for c in centres for border in (SIDE // 3, 2 * SIDE // 3)):
            continue
        right, bottom = left + size, top + size
        if all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in taken):
            return left, top, right, bottom
    return None


def _boxes(count: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """`count` boxes that do not overlap; a crowded start is thrown away and begun again."""
    while True:
        taken: list[tuple[int, int, int, int]] = []
        while len(taken) < count:
            box = _free_box(taken, rng)
            if box is None:
                break
            taken.append(box)
        else:
            return taken


def draw(rng: np.random.Generator, things: tuple[int, int] = MANY) -> tuple[Image.Image, Scene]:
    """A picture (RGB, SIDE x SIDE) with `things[0]` to `things[1]` things, and what is in it."""
    background = str(rng.choice(BACKGROUNDS))
    picture = Image.fromarray(_background(background, rng))
    placed = []
    for box in _boxes(int(rng.integers(things[0], things[1] + 1)), rng):
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        shape, digit = SHAPES[rng.integers(len(SHAPES))], DIGITS[rng.integers(len(DIGITS))]
        left, top, right, _ = box
        size = right - left
        ink = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-7, 8, 3), 0, 255))
        picture.paste(ink, (left, top), _shape_mask(shape, size))
        # The widest part of a triangle is low and that of a heart is high.
        drop = {"triangle": size // 6, "heart": -size // 12}.get(shape, 0)
        corner = (left + size // 2 - 5, top + size // 2 - 7 + drop)
        picture.paste((255, 255, 255) if colour in _WHITE_INK else (0, 0, 0), corner, _digit_mask(digit))
        placed.append(Thing(colour, shape, digit, box))
    return picture, Scene(tuple(placed), background)
