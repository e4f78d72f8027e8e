"""Draws tiles with the tokens that are left, and lays the drawings out with words around them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_squeeze.reporting.boxes import Box, cell_box

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from mllm_squeeze.layout import Tile

Rgb = tuple[int, int, int]

PAPER: Rgb = (203, 206, 212)
INK: Rgb = (34, 38, 46)
LINE: Rgb = (255, 255, 255)
GREYED = 0.84
CELL = 26
MAX_FRAMES = 6
INCHES = 2.6


@dataclass(frozen=True)
class View:
    """One rectangle of tokens over one picture: tile and frame number, and the picture to draw on."""

    tile: int
    frame: int
    picture: Image.Image


def cells_of(tiles: Sequence[Tile]) -> dict[tuple[int, int, int, int], int]:
    """(tile, t, h, w) of each cell -> index into the span; separators are left out."""
    places = [(number, *place) for number, tile in enumerate(tiles) for place in tile.coordinates()]
    return {place: index for index, place in enumerate(places) if place[1] >= 0}


def views_of(tiles: Sequence[Tile], frames: Sequence[Image.Image], boxes: Sequence[Box]) -> list[View]:
    """The rectangles to draw: every tile, and of a long video MAX_FRAMES frames spread over its length."""
    views = []
    for number, tile in enumerate(tiles):
        count = min(tile.frames, MAX_FRAMES)
        for shown in range(count):
            t = shown * (tile.frames - 1) // max(1, count - 1)
            # A token may stand for several frames (Qwen merges two): take the middle one of those it covers.
            frame = frames[min(len(frames) - 1, int((t + 0.5) * len(frames) / tile.frames))].convert("RGB")
            left, top, right, bottom = boxes[number]
            w, h = frame.size
            crop = frame.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))
            views.append(View(number, t, crop))
    return views


def draw(
    view: View,
    tiles: Sequence[Tile],
    order: dict[tuple[int, int, int, int], int],
    kept: frozenset[int] | None = None,
    colours: dict[int, Rgb] | None = None,
) -> Image.Image:
    """The picture of one view; `kept` None draws it whole, with its grid."""
    from PIL import Image, ImageDraw

    tile = tiles[view.tile]
    size = _canvas(view.picture, tile)
    clear = view.picture.resize(size, Image.Resampling.LANCZOS)
    faded = Image.blend(clear.convert("L").convert("RGB"), Image.new("RGB", size, PAPER), GREYED)
    grid = Image.blend(clear, Image.new("RGB", size, LINE), 0.45)
    canvas = faded.copy()
    pen = ImageDraw.Draw(canvas)
    for h in range(tile.height):
        for w in range(tile.width):
            index = order[view.tile, view.frame, h, w]
            box = cell_box(*size, tile.height, tile.width, h, w)
            alive = kept is None or index in kept
            if alive:
                # A thin lighter rim, one pixel to each side, is the grid.
                canvas.paste(grid.crop(box), box[:2])
                inner = (box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1)
                canvas.paste(clear.crop(inner), inner[:2])
            if colours and index in colours:
                _tint(canvas, pen, box, colours[index], alive)
    return canvas


def _canvas(picture: Image.Image, tile: Tile) -> tuple[int, int]:
    """Size in pixels to draw at: the shape of the picture, with cells of about CELL pixels, within reason."""
    scale = max(CELL * tile.width / picture.width, CELL * tile.height / picture.height)
    scale = min(scale, 1600 / max(picture.size))
    return max(tile.width, round(picture.width * scale)), max(tile.height, round(picture.height * scale))


def _tint(canvas: Image.Image, pen: Any, box: tuple[int, int, int, int], colour: Rgb, alive: bool) -> None:
    """Colour a member of a group: a rim around its survivor, a wash over what went into it."""
    from PIL import Image

    if alive:
        pen.rectangle((box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2), outline=colour, width=3)
        return
    piece = canvas.crop(box)
    canvas.paste(Image.blend(piece, Image.new("RGB", piece.size, colour), 0.45), box[:2])


def colours_of(groups: Sequence[int]) -> dict[int, Rgb]:
    """A colour for each token of a group with more than one member, hues far apart from one group to the next."""
    members: dict[int, list[int]] = {}
    for index, survivor in enumerate(groups):
        if survivor >= 0:
            members.setdefault(survivor, []).append(index)
    shared = [tokens for _, tokens in sorted(members.items()) if len(tokens) > 1]
    out: dict[int, Rgb] = {}
    for number, tokens in enumerate(shared):
        red, green, blue = colorsys.hls_to_rgb(0.618034 * number % 1, 0.52, 0.68)
        out.update(dict.fromkeys(tokens, (round(255 * red), round(255 * green), round(255 * blue))))
    return out


def headers_of(tiles: Sequence[Tile], views: Sequence[View]) -> list[str]:
    """Words over each view: the frame of a video, the size of a tile."""
    words = []
    for view in views:
        tile = tiles[view.tile]
        size = f"{tile.height} x {tile.width} tokens"
        words.append(f"frame {view.frame + 1} of {tile.frames}" if tile.frames > 1 else size)
    return words


def lay_out(
    rows: Sequence[Sequence[Image.Image]],
    over: Sequence[str],
    beside: Sequence[str] | None = None,
    under: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """A grid of pictures with words over each column, beside each row and under each picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = rows[0][0]
    tall = INCHES * min(max(first.height / first.width, 0.4), 2.0)
    margin = 0.08 if beside is None else 0.45 + 0.08 * max(len(line) for words in beside for line in words.split("\n"))
    head = 0.14 + 0.19 * max(words.count("\n") + 1 for words in over)
    foot = 0.0 if under is None else 0.26
    width = margin + 0.08 + len(over) * (INCHES + 0.12)
    height = head + 0.06 + len(rows) * (tall + 0.12 + foot)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    ink = tuple(part / 255 for part in INK)
    for i, pictures in enumerate(rows):
        for j, picture in enumerate(pictures):
            bottom = height - head - i * (tall + 0.12 + foot) - tall
            left = margin + j * (INCHES + 0.12)
            axes = figure.add_axes((left / width, bottom / height, INCHES / width, tall / height))
            axes.imshow(picture, interpolation="antialiased")
            axes.set_axis_off()
            if i == 0:
                axes.set_title(over[j], fontsize=9, color=ink, pad=5, linespacing=1.25)
            if j == 0 and beside is not None:
                axes.text(
                    -0.06, 0.5, beside[i], transform=axes.transAxes, ha="right", va="center", fontsize=9, color=ink
                )
            if under is not None:
                axes.text(
                    0.5, -0.03, under[i][j], transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=ink
                )
    return figure
