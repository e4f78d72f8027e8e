"""Pictures of survivors: the image, or the frames of a video, with the dropped tokens greyed out, a panel per step."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mllm_squeeze.errors import ConfigError, SqueezeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from mllm_squeeze.layout import Span, Tile, TokenLayout

    class _Cut(Protocol):
        @property
        def layer(self) -> int: ...
        @property
        def kept(self) -> Sequence[Any]: ...

    class _Handle(Protocol):
        @property
        def layout(self) -> TokenLayout | None: ...
        @property
        def cuts(self) -> Sequence[_Cut]: ...
        @property
        def method(self) -> str: ...


Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
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


def cell_box(width: int, height: int, rows: int, columns: int, row: int, column: int) -> tuple[int, int, int, int]:
    """Return the pixels (left, top, right, bottom; the last two excluded) that cell (row, column) covers."""
    return (
        round(column * width / columns),
        round(row * height / rows),
        round((column + 1) * width / columns),
        round((row + 1) * height / rows),
    )


def crop_boxes(columns: int, rows: int, overview: str | None = None) -> list[Box]:
    """Return what each tile covers, as fractions, for crops in raster order and an overview "first", "last" or None."""
    crops = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    if overview is None:
        return crops
    return [WHOLE, *crops] if overview == "first" else [*crops, WHOLE]


def centre_square(width: int, height: int) -> Box:
    """Return the largest centred square as fractions: what an image processor that crops, as CLIP's, leaves."""
    side = min(width, height)
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    return (left, top, left + side / width, top + side / height)


def show(
    images: Image.Image | Sequence[Image.Image],
    tiles: Sequence[Tile],
    kept: Sequence[Sequence[int]],
    *,
    titles: Sequence[str] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    boxes: Sequence[Box] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw which tokens of one span survived each step.

    images: the picture, or the frames of a video (any number; the frame nearest to each token is taken). tiles: grid of
    the span as in `Span.tiles`. kept: per step the indices into the span that survived. titles: words over each panel.
    groups: per step, for each token of the span the index of the survivor it went into (-1: none); members get the
    colour of their group. boxes: the part of the picture that each tile covers, as fractions (left, top, right,
    bottom); the whole by default. path: where to save. Separators are not drawn.

    Raises ConfigError where lengths do not fit, SqueezeError where matplotlib or pillow is missing.
    """
    _need("matplotlib", "PIL")
    steps = [frozenset(step) for step in kept]
    total = sum(tile.length for tile in tiles)
    names = list(titles) if titles is not None else [f"step {i}" for i in range(len(steps))]
    _check(tiles, steps, names, groups, boxes)
    frames = [images] if not isinstance(images, Sequence) else list(images)
    views = _views(tiles, frames, boxes or [WHOLE] * len(tiles))
    order = _cells(tiles)
    rows = [[_draw(view, tiles, order) for view in views]]
    for i, step in enumerate(steps):
        colours = _colours(groups[i]) if groups is not None else {}
        rows.append([_draw(view, tiles, order, step, colours) for view in views])
    words = [f"all tokens\n{_count(total)}"]
    words += [f"{name}\n{_count(len(step))} kept" for name, step in zip(names, steps, strict=True)]
    if len(views) == 1:
        figure = _lay_out([[row[0] for row in rows]], words)
    else:
        figure = _lay_out(rows, _headers(tiles, views), [line.replace(", ", ",\n") for line in words])
    if path is not None:
        figure.savefig(path, dpi=150, facecolor="white")
    return figure


def handle_figure(
    handle: _Handle,
    images: Image.Image | Sequence[Image.Image],
    path: str | Path | None = None,
    *,
    span: int = 0,
    boxes: Sequence[Box] | None = None,
    cropped: bool = False,
) -> Figure:
    """Draw what the last prefill of a handle kept of one span.

    images: that picture, or the frames of that video. span: number of the span in `handle.layout.spans`. cropped: the
    image processor cut out the centred square. boxes: as in `show`; found from the picture's shape where the span is
    cut into several crops of equal size. Raises ConfigError where the span or its grid is not known.
    """
    if handle.layout is None:
        raise ConfigError("nothing to draw: no prompt with an image or video went through the model since apply")
    spans = handle.layout.spans
    if not 0 <= span < len(spans):
        raise ConfigError(f"there is no span {span}: the last prefill had {len(spans)} (numbers start at 0)")
    chosen = spans[span]
    if not chosen.tiles:
        raise ConfigError(f"the grid of span {span} is not known for this model: call viz.show with tiles of your own")
    first = images[0] if isinstance(images, Sequence) else images
    if boxes is None:
        boxes = _guess_boxes(chosen.tiles, first.width, first.height, cropped)
    kept = [survivors(chosen, cut) for cut in handle.cuts]
    titles = [f"{handle.method}, {'keys' if handle.layout.keys else f'layer {cut.layer}'}" for cut in handle.cuts]
    return show(images, chosen.tiles, kept, titles=titles, boxes=boxes, path=path)


def sheet(
    images: Sequence[Image.Image],
    tiles: Sequence[Tile],
    kept: Sequence[Sequence[Sequence[int]]],
    *,
    titles: Sequence[str],
    rows: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw several pictures (rows) by several methods (columns), each with the tokens that survived.

    images: one picture to a row, all with the same first tile. kept: [row][column] indices into the span. titles: words
    over the columns; the first column, over which nothing is asked of the caller, is the picture with all its tokens.
    rows: words beside the rows. captions: [row][column] words under each picture, the whole one included.
    """
    _need("matplotlib", "PIL")
    order = _cells(tiles)
    drawn = []
    for image, columns in zip(images, kept, strict=True):
        view = _views(tiles, [image], [WHOLE] * len(tiles))[0]
        steps: list[frozenset[int] | None] = [None, *map(frozenset, columns)]
        drawn.append([_draw(view, tiles, order, step) for step in steps])
    figure = _lay_out(drawn, [f"all tokens\n{_count(sum(tile.length for tile in tiles))}", *titles], rows, captions)
    if path is not None:
        figure.savefig(path, dpi=110, facecolor="white")
    return figure


def survivors(span: Span, cut: _Cut) -> list[int]:
    """Return the indices into the span of the tokens that a cut left."""
    seen = cut.kept[span.sample]
    columns = frozenset(seen.tolist() if hasattr(seen, "tolist") else seen)
    return [i for i, column in enumerate(span.columns) if column in columns]


def _need(*modules: str) -> None:
    """Fail with the name of the extra where a drawing library is missing."""
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            raise SqueezeError(
                f"drawing needs {module}, which is not installed: pip install 'mllm-squeeze[viz]'"
            ) from error


def _check(
    tiles: Sequence[Tile],
    steps: Sequence[frozenset[int]],
    names: Sequence[str],
    groups: Sequence[Sequence[int]] | None,
    boxes: Sequence[Box] | None,
) -> None:
    total = sum(tile.length for tile in tiles)
    for i, step in enumerate(steps):
        if step and not 0 <= min(step) <= max(step) < total:
            raise ConfigError(f"kept[{i}] must hold indices from 0 to {total - 1}; got {min(step)} to {max(step)}")
    if len(names) != len(steps):
        raise ConfigError(f"got {len(names)} titles for {len(steps)} steps")
    if boxes is not None and len(boxes) != len(tiles):
        raise ConfigError(f"got {len(boxes)} boxes for {len(tiles)} tiles")
    if groups is not None and [len(group) for group in groups] != [total] * len(steps):
        raise ConfigError(f"groups must hold one list of {total} indices for each of the {len(steps)} steps")


def _guess_boxes(tiles: Sequence[Tile], width: int, height: int, cropped: bool) -> list[Box]:
    """What each tile covers: crops of equal size, an overview behind them, are laid out as the picture's shape asks."""
    if cropped:
        return [centre_square(width, height)] * len(tiles)
    if len(tiles) < 3 or len(set(tiles)) > 1:
        return [WHOLE] * len(tiles)
    crops = len(tiles) - 1
    pairs = [(columns, crops // columns) for columns in range(1, crops + 1) if crops % columns == 0]
    columns, rows = min(pairs, key=lambda pair: abs(pair[0] / pair[1] - width / height))
    return crop_boxes(columns, rows, "last")


def _cells(tiles: Sequence[Tile]) -> dict[tuple[int, int, int, int], int]:
    """(tile, t, h, w) of each cell -> index into the span; separators are left out."""
    places = [(number, *place) for number, tile in enumerate(tiles) for place in tile.coordinates()]
    return {place: index for index, place in enumerate(places) if place[1] >= 0}


def _views(tiles: Sequence[Tile], frames: Sequence[Image.Image], boxes: Sequence[Box]) -> list[View]:
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


def _draw(
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


def _colours(groups: Sequence[int]) -> dict[int, Rgb]:
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


def _headers(tiles: Sequence[Tile], views: Sequence[View]) -> list[str]:
    """Words over each view: the frame of a video, the size of a tile."""
    words = []
    for view in views:
        tile = tiles[view.tile]
        size = f"{tile.height} x {tile.width} tokens"
        words.append(f"frame {view.frame + 1} of {tile.frames}" if tile.frames > 1 else size)
    return words


def _lay_out(
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


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")
