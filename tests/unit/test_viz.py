"""Pictures of survivors: which pixels belong to which token."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="drawing needs the extra `viz`")
from PIL import Image

from mllm_squeeze.errors import ConfigError, SqueezeError
from mllm_squeeze.layout import Span, Tile, TokenLayout
from mllm_squeeze.reporting import boxes, drawing
from mllm_squeeze.reporting import pictures as viz

RED, BLUE = (250, 10, 10), (10, 10, 250)


def drawn(picture: Image.Image, tiles: list[Tile], kept: list[int], view: int = 0) -> list[list[bool]]:
    """Which cells of a view kept their colour, read off the pixels in the middle of each cell."""
    views = drawing.views_of(tiles, [picture], [viz.WHOLE] * len(tiles))
    image = drawing.draw(views[view], tiles, drawing.cells_of(tiles), frozenset(kept))
    tile = tiles[views[view].tile]
    out = []
    for row in range(tile.height):
        cells = [boxes.cell_box(*image.size, tile.height, tile.width, row, column) for column in range(tile.width)]
        out.append([_colourful(image.getpixel(((a + c) // 2, (b + d) // 2))) for a, b, c, d in cells])
    return out


def _colourful(pixel: tuple[int, ...]) -> bool:
    return max(pixel) - min(pixel) > 100


@dataclass
class Cut:
    layer: int
    kept: list[torch.Tensor]


@dataclass
class Handle:
    layout: TokenLayout | None
    cuts: tuple[Cut, ...]
    method: str = "fastv"


def handle_for(span: Span, *kept: list[int]) -> Handle:
    layout = TokenLayout(span.sample + 1, 64, (span,), torch.ones(span.sample + 1, 64, dtype=torch.bool))
    cuts = tuple(Cut(i, [torch.tensor([])] * span.sample + [torch.tensor(step)]) for i, step in enumerate(kept))
    return Handle(layout, cuts)


def test_cells_tile_the_picture_without_gap_or_overlap() -> None:
    width, height, rows, columns = 337, 211, 24, 7
    covered = torch.zeros(height, width, dtype=torch.long)
    for row in range(rows):
        for column in range(columns):
            left, top, right, bottom = boxes.cell_box(width, height, rows, columns, row, column)
            covered[top:bottom, left:right] += 1
    assert bool((covered == 1).all())


def test_cell_of_the_square_grid() -> None:
    # LLaVA-1.5: token 25 is row 1, column 1 of 24 x 24 patches of 14 pixels.
    assert Tile(1, 24, 24).coordinates()[25] == (0, 1, 1)
    assert boxes.cell_box(336, 336, 24, 24, 1, 1) == (14, 14, 28, 28)


def test_square_grid_greys_what_was_dropped() -> None:
    picture = Image.new("RGB", (60, 60), RED)
    assert drawn(picture, [Tile(1, 3, 3)], [0, 5, 7]) == [
        [True, False, False],
        [False, False, True],
        [False, True, False],
    ]


def test_newline_separators_are_skipped() -> None:
    # Overview of 2 x 2, then 2 rows of 3 cells with a newline each: indices 4 5 6 (7) / 8 9 10 (11).
    tiles = [Tile(1, 2, 2), Tile(1, 2, 3, row_separators=1)]
    picture = Image.new("RGB", (90, 60), BLUE)
    kept = [3, 4, 7, 10, 11]
    assert drawn(picture, tiles, kept, 0) == [[False, False], [False, True]]
    assert drawn(picture, tiles, kept, 1) == [[True, False, False], [False, False, True]]


def test_frames_take_their_picture_and_their_tokens() -> None:
    # CLS before each frame (Video-LLaVA): frame 0 is indices 1 to 4, frame 1 is 6 to 9.
    tiles = [Tile(2, 2, 2, frame_lead=1)]
    frames = [Image.new("RGB", (40, 40), RED), Image.new("RGB", (40, 40), BLUE)]
    views = drawing.views_of(tiles, frames, [viz.WHOLE])
    order = drawing.cells_of(tiles)
    images = [drawing.draw(view, tiles, order, frozenset([1, 9])) for view in views]
    assert [view.frame for view in views] == [0, 1]
    left_top, right_bottom = (images[0].width // 4, images[0].height // 4), (3 * images[0].width // 4,) * 2
    assert images[0].getpixel(left_top)[0] > 200 and not _colourful(images[0].getpixel(right_bottom))
    assert images[1].getpixel(right_bottom)[2] > 200 and not _colourful(images[1].getpixel(left_top))


def test_merged_frames_show_a_frame_they_cover() -> None:
    # Eight frames on four temporal tokens (Qwen merges two): token t shows frame 2t + 1.
    frames = [Image.new("RGB", (8, 8), (30 * i, 0, 0)) for i in range(8)]
    views = drawing.views_of([Tile(4, 1, 1)], frames, [viz.WHOLE])
    assert [view.picture.getpixel((0, 0))[0] for view in views] == [30, 90, 150, 210]


def test_a_long_video_shows_frames_from_first_to_last() -> None:
    views = drawing.views_of([Tile(50, 1, 1)], [Image.new("RGB", (8, 8))], [viz.WHOLE])
    assert len(views) == drawing.MAX_FRAMES
    assert views[0].frame == 0 and views[-1].frame == 49


def test_crops_lie_where_the_picture_asks() -> None:
    tiles = [Tile(1, 2, 2)] * 7
    wide = boxes.guess_boxes(tiles, 300, 200, cropped=False)
    assert wide == viz.crop_boxes(3, 2, "last")
    assert wide[0] == (0, 0, 1 / 3, 1 / 2) and wide[-1] == viz.WHOLE
    assert boxes.guess_boxes(tiles, 200, 300, cropped=False) == viz.crop_boxes(2, 3, "last")
    assert viz.crop_boxes(2, 1, "first")[0] == viz.WHOLE
    assert viz.crop_boxes(2, 1) == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]


def test_a_cropping_processor_sees_the_centred_square() -> None:
    assert viz.centre_square(200, 100) == (0.25, 0.0, 0.75, 1.0)
    assert viz.centre_square(100, 400) == (0.0, 0.375, 1.0, 0.625)
    picture = Image.new("RGB", (200, 100), RED)
    picture.paste(BLUE, (50, 0, 150, 100))
    view = drawing.views_of([Tile(1, 2, 2)], [picture], boxes.guess_boxes([Tile(1, 2, 2)], 200, 100, cropped=True))[0]
    assert view.picture.size == (100, 100)
    assert view.picture.getcolors() == [(10000, BLUE)]


def test_survivors_of_a_span_in_several_runs() -> None:
    span = Span(1, "video", 0, ((4, 2), (8, 2)), (Tile(2, 1, 2),))
    cut = Cut(0, [torch.tensor([5]), torch.tensor([0, 1, 5, 8, 20])])
    assert viz.survivors(span, cut) == [1, 2]


def test_handle_figure_has_a_panel_for_each_step(tmp_path: Path) -> None:
    span = Span(0, "image", 0, ((5, 9),), (Tile(1, 3, 3),))
    handle = handle_for(span, [0, 1, 5, 6, 13], [0, 1, 13])
    path = tmp_path / "kept.png"
    figure = viz.handle_figure(handle, Image.new("RGB", (60, 60), RED), path)
    assert [axes.get_title() for axes in figure.axes] == [
        "all tokens\n9",
        "fastv, layer 0\n3 kept",
        "fastv, layer 1\n1 kept",
    ]
    assert Image.open(path).size[0] > 600


def test_video_figure_has_a_row_for_each_step() -> None:
    span = Span(0, "video", 0, ((5, 8),), (Tile(2, 2, 2),))
    figure = viz.handle_figure(handle_for(span, [5, 6]), [Image.new("RGB", (60, 60), RED)] * 4)
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == ["frame 1 of 2", "frame 2 of 2", "", ""]


def test_groups_colour_members_and_survivor() -> None:
    colours = drawing.colours_of([0, 0, 2, 3, 3, -1])
    assert set(colours) == {0, 1, 3, 4}
    assert colours[0] == colours[1] != colours[3] == colours[4]
    view = drawing.views_of([Tile(1, 1, 2)], [Image.new("RGB", (80, 40), (128, 128, 128))], [viz.WHOLE])[0]
    plain = drawing.draw(view, [Tile(1, 1, 2)], drawing.cells_of([Tile(1, 1, 2)]), frozenset([0]))
    tinted = drawing.draw(
        view, [Tile(1, 1, 2)], drawing.cells_of([Tile(1, 1, 2)]), frozenset([0]), drawing.colours_of([0, 0])
    )
    middle = (3 * plain.width // 4, plain.height // 2)
    assert plain.getpixel(middle) != tinted.getpixel(middle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": [[9]]}, "from 0 to 8"),
        ({"kept": [[-1]]}, "from 0 to 8"),
        ({"titles": []}, "0 titles for 1 steps"),
        ({"boxes": []}, "0 boxes for 1 tiles"),
        ({"groups": [[0]]}, "one list of 9 indices"),
    ],
)
def test_wrong_lengths_are_named(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"kept": [[0]], **changes}
    with pytest.raises(ConfigError, match=message):
        viz.show(Image.new("RGB", (9, 9)), [Tile(1, 3, 3)], **arguments)  # type: ignore[arg-type]


def test_missing_prefill_span_or_grid_is_named() -> None:
    span = Span(0, "image", 0, ((0, 9),))
    with pytest.raises(ConfigError, match="nothing to draw"):
        viz.handle_figure(Handle(None, ()), Image.new("RGB", (9, 9)))
    with pytest.raises(ConfigError, match="no span 3"):
        viz.handle_figure(handle_for(span, [0]), Image.new("RGB", (9, 9)), span=3)
    with pytest.raises(ConfigError, match="grid of span 0 is not known"):
        viz.handle_figure(handle_for(span, [0]), Image.new("RGB", (9, 9)))


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SqueezeError, match=r"mllm-squeeze\[viz\]"):
        viz.show(Image.new("RGB", (9, 9)), [Tile(1, 3, 3)], [[0]])
