"""Pictures of survivors: the image, or the frames of a video, with the dropped tokens greyed out, a panel per step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mllm_squeeze.errors import ConfigError, SqueezeError
from mllm_squeeze.reporting.boxes import WHOLE, Box, guess_boxes
from mllm_squeeze.reporting.boxes import centre_square as centre_square
from mllm_squeeze.reporting.boxes import crop_boxes as crop_boxes
from mllm_squeeze.reporting.drawing import cells_of, colours_of, draw, headers_of, lay_out, views_of

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
    views = views_of(tiles, frames, boxes or [WHOLE] * len(tiles))
    order = cells_of(tiles)
    rows = [[draw(view, tiles, order) for view in views]]
    for i, step in enumerate(steps):
        colours = colours_of(groups[i]) if groups is not None else {}
        rows.append([draw(view, tiles, order, step, colours) for view in views])
    words = [f"all tokens\n{_count(total)}"]
    words += [f"{name}\n{_count(len(step))} kept" for name, step in zip(names, steps, strict=True)]
    if len(views) == 1:
        figure = lay_out([[row[0] for row in rows]], words)
    else:
        figure = lay_out(rows, headers_of(tiles, views), [line.replace(", ", ",\n") for line in words])
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
        boxes = guess_boxes(chosen.tiles, first.width, first.height, cropped)
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
    order = cells_of(tiles)
    drawn = []
    for image, columns in zip(images, kept, strict=True):
        view = views_of(tiles, [image], [WHOLE] * len(tiles))[0]
        steps: list[frozenset[int] | None] = [None, *map(frozenset, columns)]
        drawn.append([draw(view, tiles, order, step) for step in steps])
    figure = lay_out(drawn, [f"all tokens\n{_count(sum(tile.length for tile in tiles))}", *titles], rows, captions)
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


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")
