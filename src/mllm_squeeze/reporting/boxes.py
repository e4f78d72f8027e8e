"""Which part of a picture each tile of a span covers, and each token of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm_squeeze.layout import Tile

# Left, top, right and bottom, as fractions of the picture.
Box = tuple[float, float, float, float]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


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


def guess_boxes(tiles: Sequence[Tile], width: int, height: int, cropped: bool) -> list[Box]:
    """What each tile covers: crops of equal size, an overview behind them, are laid out as the picture's shape asks."""
    if cropped:
        return [centre_square(width, height)] * len(tiles)
    if len(tiles) < 3 or len(set(tiles)) > 1:
        return [WHOLE] * len(tiles)
    crops = len(tiles) - 1
    pairs = [(columns, crops // columns) for columns in range(1, crops + 1) if crops % columns == 0]
    columns, rows = min(pairs, key=lambda pair: abs(pair[0] / pair[1] - width / height))
    return crop_boxes(columns, rows, "last")
